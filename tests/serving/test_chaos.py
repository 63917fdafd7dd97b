"""A cluster under faults, as scripts/chaos.py does it, for a minute: that the script works, and that nobody notices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# On a new machine 20 programs are compiled first.
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SMALL = ["--max-batch", "16", "--streams", "8", "--jobs", "16", "--tokens", "60", "100", "--quiet", "2"]


def test_streams_do_not_notice(tmp_path):
    faults = ["--hosts", "3", "--faults", "3", "--seed", "5", "--kinds", "host", "stop engine", "during"]
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), *SMALL, *faults, "--logs", str(tmp_path), "--json"]
    environ = {**os.environ, "MOE_JAX_CACHE": str(ROOT / ".cache" / "programs")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=840)
    assert done.stdout, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert done.returncode == 0, (result["tally"], result["faults"], done.stderr[-4000:])
    tally = result["tally"]
    assert tally["streams"] > 8 and tally["tokens"] > 500
    assert not tally["lost"] + tally["duplicated"] + tally["changed"] + tally["errors"] + tally["hung"]
    assert [f["recovered"] for f in result["faults"]] == [True] * 3
    assert not any(f["missing"] or f["compilations"] for f in result["faults"])
