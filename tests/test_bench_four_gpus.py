"""scripts/bench_four_gpus.py and bench_dispatch.py: what they compute by themselves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import ConfigError

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from _cluster import Job, Stream  # noqa: E402  # pyright: ignore[reportMissingImports]
from bench_dispatch import capacity_for, draw_routing  # noqa: E402  # pyright: ignore[reportMissingImports]
from bench_four_gpus import clean, divergence, layers_that_fit  # noqa: E402  # pyright: ignore[reportMissingImports]

GIB = 1 << 30
JOBS = [Job("a", 4, 0.0, 0), Job("b", 4, 0.8, 1)]


def test_where_streams_diverge() -> None:
    undisturbed = {JOBS[0]: [1, 2, 3, 4], JOBS[1]: [5, 6, 7, 8]}
    streams = [Stream(JOBS[0], [1, 2, 3, 4]), Stream(JOBS[1], [5, 6, 0, 8]), Stream(JOBS[0], [1, 0, 0, 0])]
    found = divergence(undisturbed, streams)
    assert found == {"streams": 3, "diverged": 2, "at": {"least": 1, "median": 1.5, "most": 2}}
    assert divergence(undisturbed, streams[:1]) == {"streams": 1, "diverged": 0, "at": {}}


def test_layers_that_fit() -> None:
    options = {"max_batch": 64, "max_model_len": 512, "max_prefill_rows": 2048, "num_pages": 512}
    assert layers_that_fit("qwen3-30b-a3b", 4, 104 * GIB, **options) == 48
    four, two = (layers_that_fit("deepseek-v3", ranks, 104 * GIB, **options) for ranks in (4, 2))
    assert 61 > four > two > 3  # of which three are dense
    with pytest.raises(ConfigError, match="memory: found 2.00 GiB"):
        layers_that_fit("deepseek-v3", 4, 2 * GIB, **options)


def test_what_is_clean() -> None:
    tally = dict.fromkeys(("lost", "duplicated", "changed", "errors", "hung"), 0)
    good = {"faults": {"tally": tally, "events": [{"recovered": True}]}, "losses": {"tally": tally}}
    assert clean(good) and clean({})
    assert not clean(good | {"exact": {"tally": tally | {"changed": 1}}})
    assert not clean(good | {"exact": {"events": [{"recovered": False}]}})


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
def test_buffers_that_drop_nothing(ranks: int, tokens: int, top_k: int, seed: int) -> None:
    experts = 4 * ranks
    ids, weights = draw_routing(np.random.default_rng(seed), ranks * tokens, experts, top_k)
    assert all(len(set(row)) == top_k for row in ids) and np.allclose(weights.sum(1), 1)
    most = max(
        sum(any(e // 4 == to for e in row) for row in ids[tokens * source : tokens * (source + 1)])
        for source in range(ranks)
        for to in range(ranks)
    )
    assert capacity_for(ids, ranks, experts) == most


def test_both_ways_of_dispatch_agree() -> None:
    """On four devices, in a process of its own: the script ends with an error where they do not."""
    code = "import jax; jax.config.update('jax_platforms', 'cpu'); import bench_dispatch; bench_dispatch.main()"
    order = ["--devices", "4", "--tokens", "5", "--sizes", "16,8", "--top-k", "3", "--dtype", "float32", "--json"]
    out = subprocess.run([sys.executable, "-c", code, *order], cwd=SCRIPTS, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr[-2000:]
    assert '"ratio"' in out.stdout
