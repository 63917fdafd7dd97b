"""scripts/bench_serving.py, in small, on this CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_serving.py"


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    order = [sys.executable, str(SCRIPT), "--shape", "demo", "--batch", "16", "--context", "64", "--steps", "2"]
    out = tmp_path / "out.json"
    subprocess.run([*order, "--peer-batch", "--json", str(out)], check=True, timeout=280)
    (ours,) = json.loads(out.read_text())["ours"]
    assert ours["prefill"] > 0 and ours["first_token"] > 0
    (line,) = ours["decode"]
    assert 1 <= line["hit"] <= 16 and line["roofline"] > 0
