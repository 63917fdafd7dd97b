"""`LLM(hosts=n)`: real engines in real processes. Each start of a cluster takes 15 to 40 seconds, so most share one.

What fake engines can show is in test_coordinator.py and test_cluster_backend.py.
"""

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
from serving.rebalancing import Policy

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMALL: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32}  # fewer and smaller programs


@pytest.fixture(scope="module")
def cluster():
    """Built in a thread that has ended since, as in a server: the processes must not end with it."""
    built = []
    thread = threading.Thread(target=lambda: built.append(LLM("demo", hosts=4, **SMALL)))
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


def processes() -> dict[int, int]:
    """Processes of ours on this machine, zombies left out: those that started them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            if "-m serving." in command:
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def family(parent: int) -> set[int]:
    """What `parent` started, and what that started."""
    all_of_them = processes()
    children = {pid for pid, by in all_of_them.items() if by == parent}
    return children | {pid for pid, by in all_of_them.items() if by in children}


def assert_all_gone(pids):
    deadline = time.monotonic() + 10
    while left := set(pids) & set(processes()):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def heal(llm):
    """Wait until all ranks serve, and have the programs for the loss of one."""
    deadline = time.monotonic() + 240
    while any(r["state"] != "live" or not {3, 4} <= set(r["programs"]) for r in backend(llm).status()["ranks"]):
        assert time.monotonic() < deadline, backend(llm).status()
        time.sleep(0.1)


def kill(pid, number=signal.SIGKILL):
    assert pid is not None
    os.kill(pid, number)


def test_the_same_tokens_as_one_process(cluster, single):
    long = list(range(10, 1110))
    prompts = ["The capital of", "Once upon a time", long, "In the year 1900", [5], "x", "She said", "The", "A b c"]
    temperatures = (0, 0, 0, 0, 0, 0.9, 1.0, 0.7, 1.3)
    params = [SamplingParams(max_tokens=12, temperature=t, seed=i) for i, t in enumerate(temperatures)]
    got, expected = cluster.generate(prompts, params), single.generate(prompts, params)
    for g, e in zip(got, expected, strict=True):
        g, e = g.outputs[0], e.outputs[0]
        assert (g.token_ids, g.text, g.finish_reason) == (e.token_ids, e.text, e.finish_reason)
    assert backend(cluster).status()["compilations"] == 0  # since it serves


def test_the_same_log_probabilities_bit_by_bit(cluster, single):
    tokens = [(7 * i) % 4000 for i in range(150)]
    got = cluster.score(tokens)
    assert np.array_equal(got, single.score(tokens)) and got.shape == (150, single.config.vocab_size)
    assert np.array_equal(got, cluster.score(tokens, chunk=16))
    with pytest.raises(ValueError, match="token_ids: found 5000 tokens"):
        cluster.score([1] * 5000)


def test_experts_follow_their_load_and_no_token_changes(cluster):
    """What engines count, the coordinator moves experts for: beside the streams, and with nothing compiled."""
    running = backend(cluster)._running
    rebalancing = running.coordinator.rebalancing
    running.call(rebalancing.stop)  # else it would look at its own time
    heal(cluster)
    prompts = [[300] * 150, [4000] * 100, [7] * 100, [1000] * 50]
    params = SamplingParams(max_tokens=100, temperature=0.9, seed=1, ignore_eos=True)
    undisturbed = [out.outputs[0].token_ids for out in cluster.generate(prompts, params)]
    rebalancing.policy = Policy(above=1.02, within=1.0, gain=0.01, enough=50.0)
    ids = [cluster.submit(prompt, params) for prompt in prompts]
    tokens = {request_id: [] for request_id in ids}
    epoch, moved = backend(cluster).status()["epoch"], None
    while not all(len(t) == 100 for t in tokens.values()):
        for update in cluster.poll():
            tokens[update.request_id] += update.token_ids
        if moved is None and all(len(t) > 30 for t in tokens.values()):
            moved = running.begin(rebalancing.look())
    assert moved is not None and moved.result(20)
    assert list(tokens.values()) == undisturbed
    status = backend(cluster).status()
    made = status["switches"][-1]
    assert made["cause"] == "rebalance" and made["epoch"] > epoch and made["compile_ms"] == 0
    assert (status["compilations"], status["rebalances"], status["experts"]["missing"]) == (0, 1, 0)
    assert status["experts"]["survivable_host_losses"] == 1
    assert [out.outputs[0].token_ids for out in cluster.generate(prompts, params)] == undisturbed


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
    while not all(answer["parked"] for answer in backend(cluster).engines()):
        assert time.monotonic() < deadline
    steps = [answer["steps"] for answer in backend(cluster).engines()]
    time.sleep(0.5)
    assert [answer["steps"] for answer in backend(cluster).engines()] == steps  # parked ranks take none
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
    before = family(os.getpid())
    with pytest.raises(CheckpointError, match="config.json"):
        LLM(tmp_path, hosts=2)
    assert family(os.getpid()) == before


def test_a_checkpoint_that_only_the_ranks_find_broken(tmp_path):
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
    before = family(os.getpid())
    with pytest.raises(CheckpointError, match=r"rank \d: .*mlp.gate.weight"):
        LLM(tmp_path, hosts=2, **SMALL)
    assert_all_gone(family(os.getpid()) - before)


SCRIPT = """
from moe_jax import LLM, SamplingParams
llm = LLM("demo", hosts=2, max_batch=16, max_prefill_rows=32)
print(*llm._backend.pids, flush=True)
llm.generate(["The"], SamplingParams(max_tokens=4000, seed=0, ignore_eos=True))
"""


@pytest.mark.parametrize(
    "disturb",
    [
        lambda served: kill(served.pids[0]),
        lambda served: kill(served.call(lambda: served.launcher.pids[2])),
        lambda served: kill(served.pids[3], signal.SIGSTOP),
        lambda served: kill(served.status()["service_pid"]),
    ],
    ids=["engine of rank 0", "supervisor of rank 2", "engine of rank 3 stopped", "JAX service"],
)
def test_generating_goes_on(cluster, single, disturb):
    """The same tokens, whatever happens in the middle; and then the cluster is whole again."""
    prompts = [f"The number {i} of" for i in range(12)]
    params = [SamplingParams(max_tokens=80, temperature=0.5 * (i % 2), seed=i, ignore_eos=True) for i in range(12)]
    expected = [out.outputs[0].token_ids for out in single.generate(prompts, params)]
    served = backend(cluster)
    heal(cluster)
    before, ids = served.status(), [cluster.submit(*asked) for asked in zip(prompts, params, strict=True)]
    got: dict[str, list[int]] = {request_id: [] for request_id in ids}
    disturbed = False
    while sum(map(len, got.values())) < 12 * 80:
        for update in cluster.poll():
            got[update.request_id] += update.token_ids
        if not disturbed and min(map(len, got.values())) >= 20:
            disturb(served)
            disturbed = True
    assert [got[request_id] for request_id in ids] == expected
    heal(cluster)
    status = served.status()
    assert status["epoch"] > before["epoch"] and status["experts"]["missing"] == 0
    assert status["compilations"] == before["compilations"]


def test_scoring_goes_on(cluster, single):
    tokens = [(11 * i) % 4000 for i in range(1500)]
    expected = single.score(tokens)
    threading.Timer(0.5, lambda: kill(victim)).start()
    victim = backend(cluster).pids[0]
    assert np.array_equal(cluster.score(tokens), expected)
    heal(cluster)


def test_two_clusters_and_ranks_that_do_not_come_back(cluster):
    """A second cluster beside the first loses a host for good, and then the other one: now it cannot go on."""
    before = family(os.getpid())
    llm = LLM("demo", hosts=2, restart=False, stall_timeout=3, **SMALL)
    started = family(os.getpid()) - before
    assert len(started) == 5
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    alone = cluster.generate(["The"], params)[0].outputs[0].token_ids
    llm.submit("The", params)
    assert llm.poll()
    kill(backend(llm).pids[1])
    assert llm.generate(["The"], params)[0].outputs[0].token_ids == alone
    assert backend(llm).status()["experts"]["missing"] == 0
    llm.submit("The", SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True))
    kill(backend(llm).pids[0])
    with pytest.raises(RuntimeError, match="no step was done for"):
        while True:
            llm.poll()
    assert_all_gone(started)
    with pytest.raises(RuntimeError, match="no step was done for"):
        llm.submit("again")
    llm.close()
    llm.close()
    assert cluster.generate(["The"], params)[0].outputs[0].token_ids == alone


def test_a_killed_parent_leaves_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert parent.stdout is not None
        pids = [int(p) for p in parent.stdout.readline().split()]
        started = family(parent.pid)
        assert len(pids) == 2 and set(pids) <= started and len(started) == 5
        time.sleep(0.5)
    finally:
        parent.kill()
        parent.wait()
    assert_all_gone(started)
