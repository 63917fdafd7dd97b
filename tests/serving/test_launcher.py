"""`LLM(hosts=n)`: real processes. Each start of a cluster takes 15 to 40 seconds, so most tests share one."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax import LLM, SamplingParams
from moe_jax.checkpoint import CheckpointError
from moe_jax.config import ConfigError
from moe_jax.llm import model_directory
from moe_jax.request import Request
from serving.cluster_backend import ClusterBackend

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMALL: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32}  # fewer and smaller programs


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return os.environ.get("MOE_JAX_CACHE") or tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def cluster(cache_dir):
    """Built in a thread that has ended since, as in a server: the processes must not end with it."""
    built = []
    thread = threading.Thread(target=lambda: built.append(LLM("demo", hosts=4, cache_dir=cache_dir, **SMALL)))
    thread.start()
    thread.join()
    with built[0] as llm:
        yield llm


@pytest.fixture(scope="module")
def single():
    with LLM("demo", hosts=1, **SMALL) as llm:
        yield llm


def backend(llm) -> ClusterBackend:
    assert isinstance(llm._backend, ClusterBackend)
    return llm._backend


def processes(parent: int | None = None) -> set[int]:
    """Processes of ours, those that `parent` started or all on the machine; zombies left out."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            started_by = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "-m serving." in command and parent in (None, started_by):
            found.add(int(entry.name))
    return found


def assert_all_gone(pids):
    deadline = time.monotonic() + 10
    while left := set(pids) & processes():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def test_the_same_tokens_as_one_process(cluster, single):
    long = list(range(10, 1110))
    prompts = ["The capital of", "Once upon a time", long, "In the year 1900", [5], "x", "She said", "The", "A b c"]
    temperatures = (0, 0, 0, 0, 0, 0.9, 1.0, 0.7, 1.3)
    params = [SamplingParams(max_tokens=12, temperature=t, seed=i) for i, t in enumerate(temperatures)]
    before = backend(cluster).compilations()
    got, expected = cluster.generate(prompts, params), single.generate(prompts, params)
    for g, e in zip(got, expected, strict=True):
        g, e = g.outputs[0], e.outputs[0]
        assert (g.token_ids, g.text, g.finish_reason) == (e.token_ids, e.text, e.finish_reason)
    assert backend(cluster).compilations() == before
    assert all(answer["parked"] for answer in backend(cluster).status())


def test_the_same_log_probabilities_bit_by_bit(cluster, single):
    tokens = [(7 * i) % 4000 for i in range(150)]
    got = cluster.score(tokens)
    assert np.array_equal(got, single.score(tokens)) and got.shape == (150, single.config.vocab_size)
    assert np.array_equal(got, cluster.score(tokens, chunk=16))
    with pytest.raises(ValueError, match="token_ids: found 5000 tokens"):
        cluster.score([1] * 5000)


def test_score_while_requests_are_served(cluster):
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    alone = cluster.generate(["Once upon"], params)[0].outputs[0].token_ids
    request_id = cluster.submit("Once upon", params)
    expected = cluster.score([1, 2, 3])
    tokens = []
    while len(tokens) < 40:
        tokens += [t for u in cluster.poll() for t in u.token_ids if u.request_id == request_id]
    assert tokens == alone and np.array_equal(expected, cluster.score([1, 2, 3]))


def test_cancel_and_wait(cluster):
    params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
    ids = [cluster.submit("The", params) for _ in range(5)]
    assert cluster.poll()
    for request_id in ids:
        cluster.cancel(request_id)
    assert cluster.poll(timeout=0.1) == [] and backend(cluster).poll(None) == []
    deadline = time.monotonic() + 30
    while not all(answer["parked"] for answer in backend(cluster).status()):
        assert time.monotonic() < deadline
    steps = [answer["steps"] for answer in backend(cluster).status()]
    time.sleep(0.5)
    assert [answer["steps"] for answer in backend(cluster).status()] == steps  # parked ranks take none
    assert cluster.submit("The", SamplingParams(max_tokens=1, seed=1)) and cluster.poll()


def test_refusals_come_at_once(cluster):
    served = backend(cluster)
    with pytest.raises(ValueError, match="prompt: found 4096 tokens"):
        cluster.submit([1] * 4096)
    served.submit(Request("same", (1,), SamplingParams(max_tokens=500, seed=0, ignore_eos=True)))
    with pytest.raises(ValueError, match="'same', which is being served"):
        served.submit(Request("same", (1,), SamplingParams(seed=0)))
    served.cancel("same")
    with pytest.raises(ConfigError):
        LLM("demo", hosts=2, replication=3)
    with pytest.raises(ConfigError, match="stall_timeout"):
        LLM("demo", hosts=2, stall_timeout=0)


def test_nothing_is_started_for_a_bad_checkpoint(tmp_path):
    before = processes(os.getpid())
    with pytest.raises(CheckpointError, match="config.json"):
        LLM(tmp_path, hosts=2)
    assert processes(os.getpid()) == before


def test_a_checkpoint_that_only_the_ranks_find_broken(tmp_path, cache_dir):
    """A router that is no number is seen when it is loaded."""
    for file in model_directory("demo").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        name = next(name for name in header if name.endswith("mlp.gate.weight"))
        start, stop = header[name]["data_offsets"]
        file.seek(8 + length + start)
        file.write(b"\xff" * (stop - start))
    before = processes(os.getpid())
    with pytest.raises(CheckpointError, match=r"rank \d: .*mlp.gate.weight"):
        LLM(tmp_path, hosts=2, cache_dir=cache_dir, **SMALL)
    assert_all_gone(processes(os.getpid()) - before)


SCRIPT = """
import sys
from moe_jax import LLM, SamplingParams
llm = LLM("demo", hosts=2, cache_dir=sys.argv[1], max_batch=16, max_prefill_rows=32)
print(*llm._backend.pids, flush=True)
llm.generate(["The"], SamplingParams(max_tokens=4000, seed=0, ignore_eos=True))
"""


def test_two_at_once_and_a_killed_rank(cluster, cache_dir):
    """A second cluster beside the first loses a rank in the middle: only that cluster ends, and says why."""
    before = processes(os.getpid())
    llm = LLM("demo", hosts=2, cache_dir=cache_dir, **SMALL)
    started = processes(os.getpid()) - before
    assert len(started) == 3
    params = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    ids = [llm.submit("The", params) for _ in range(3)]
    while not llm.poll():
        pass
    os.kill(backend(llm).pids[1], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1: process \d+ was ended by SIGKILL"):
        while True:
            llm.poll()
    assert time.monotonic() - begun < 10
    assert_all_gone(started)
    with pytest.raises(RuntimeError, match="rank 1"):
        llm.submit("again")
    llm.cancel(ids[0])
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError):
        llm.generate(["x"])
    assert cluster.generate(["The"], SamplingParams(max_tokens=2, seed=0))[0].outputs[0].token_ids


def test_a_stopped_rank_is_named(cache_dir):
    llm = LLM("demo", hosts=2, cache_dir=cache_dir, stall_timeout=3, **SMALL)
    pids = backend(llm).pids
    llm.submit("The", SamplingParams(max_tokens=3000, seed=0, ignore_eos=True))
    while not llm.poll():
        pass
    with pytest.raises(RuntimeError, match="rank 0: process .* is stopped: no step was done for 3 s"):
        while True:
            os.kill(pids[0], signal.SIGSTOP)  # again and again: a sandbox that is frozen and thawed continues it
            llm.poll(timeout=0.5)
    assert_all_gone(pids)


def test_a_killed_parent_leaves_nothing(cache_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(cache_dir)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert parent.stdout is not None
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 2 and set(pids) <= processes(parent.pid)
        started = processes(parent.pid)
        assert len(started) == 3
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
    assert_all_gone(started)
