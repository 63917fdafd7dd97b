"""The command line: options, exit codes, messages."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

import serving.cli
from moe_jax.placement import read_load
from serving import generate_command
from serving.cli import main
from serving.protos import cluster_pb2, cluster_pb2_grpc
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

ROOT = Path(serving.cli.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "moe_jax"))

from test_batch import ToyLLM, simple  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*simple(10), {"prompt": 1}]))
    return ["generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]


def test_generate_json(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--json", "--seed", "1"], llm_factory=ToyLLM) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["requests"] == 11 and summary["errors"] == 1 and summary["skipped"] == 0
    assert summary["completion_tokens"] > 0 and summary["prompt_tokens"] > 0 and summary["seconds"] >= 0
    assert summary["output"] == str(tmp_path / "out.jsonl") and summary["tokens_per_second"] > 0
    assert main(files, llm_factory=ToyLLM) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "11 requests (11 from an earlier run, 1 errors), 0 tokens" in captured.err


def test_options_reach_the_model_and_the_requests(files: list[str], tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    made: list[ToyLLM] = []

    def factory(**options: Any) -> ToyLLM:
        given.append(options)
        made.append(ToyLLM())
        return made[-1]

    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    options = "--model m --hosts 4 --slots 8 --replication 2 --ranks-per-host 2 --dtype float32 --max-model-len 99"
    options += " --load-format dummy --kernels reference --max-batch 3 --page-size 16 --num-pages 5"
    options += " --max-tokens 40 --temperature 0 --top-p 0.5 --top-k 3 --stop ZZ --stop YY --ignore-eos"
    assert main([*files, *options.split()], llm_factory=factory) == 0
    expected = dict(hosts=4, slots=8, replication=2, ranks_per_host=2, max_batch=3, page_size=16, num_pages=5)
    strings = dict(model="m", dtype="float32", load_format="dummy", kernels="reference")
    assert given == [{**expected, **strings, "max_model_len": 99}] and made[0].closed
    choice = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]["choices"][0]
    assert len(choice["token_ids"]) == 40
    (tmp_path / "out.jsonl").unlink()
    assert main(files, llm_factory=factory) == 0
    assert given[1] == {"model": "demo", "hosts": 1}


def broken_model(**options: Any) -> ToyLLM:
    raise ValueError("m/config.json: unknown\nmodel_type")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "nowhere.jsonl"], "moe-jax generate: nowhere.jsonl: no such input file"),
        (["--output", "no/where/out.jsonl"], "no such directory"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--seed", "-1"], "--seed"),
        ([], "m/config.json: unknown model_type"),
    ],
)
def test_bad_input_is_one_line(
    files: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *change], llm_factory=broken_model) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        *("", "nope", "generate", "generate --nope", "generate --hosts 0", "generate --hosts"),
        *("serve --address nowhere", "serve --address x:99999", "serve --workers some", "serve --hosts 0"),
        *("worker --rank 0 --host a", "worker --coordinator a:1 --rank -1 --host a", "status --address :1", "drain"),
    ],
)
def test_bad_arguments(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv.split()) == 2
    assert "moe-jax" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *(command.name for command in serving.cli.COMMANDS)])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "usage: moe-jax" in capsys.readouterr().out


def test_interrupt_and_full_disk(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Any:
        class Failing(ToyLLM):
            def poll(self, timeout: float | None) -> list:
                raise error

        return Failing

    assert main(files, llm_factory=fails(KeyboardInterrupt())) == 130
    assert main(files, llm_factory=fails(OSError(28, "No space left on device"))) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_progress_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_jax.batch import Counts

    lines = generate_command._Lines(every=5.0)
    clock = [0.0]
    monkeypatch.setattr(generate_command.time, "monotonic", lambda: clock[0])
    lines.last = 0.0
    for second in range(12):
        clock[0] = second
        lines.update(Counts(total=100, requests=second, errors=1, completion_tokens=50, started=-1.0))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("5/100 requests, ") and "tokens/s, ETA 0:01:54, 1 errors" in printed[0]


def test_both_commands_agree_and_start_without_jax(tmp_path: Path) -> None:
    """`python -m serving.cli generate` and scripts/generate.py are the same, and neither loads JAX for --help."""
    outputs = set()
    for command in ["-m serving.cli generate --help", "scripts/generate.py --help"]:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1
    check = "import sys, serving.cli; serving.cli.main(['--help']); assert not {'jax', 'moe_jax'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True).returncode == 0


# A cluster's commands


STATUS: dict[str, Any] = {
    "epoch": 3,
    "state": "SERVING",
    "reason": "",
    "ranks": [
        {"rank": 0, "host": "a", "pid": 11, "state": "live", "device": "cpu"},
        {"rank": 1, "host": "b", "pid": None, "state": "lost", "device": None},
    ],
    "survivable_without_compiling": 1,
    "experts": {
        "logical": 8,
        "slots": 6,
        "missing": 0,
        "min_replicas": 1,
        "survivable_host_losses": 0,
        "imbalance": None,
    },
    "compilations": 0,
    "recoveries": [
        {"epoch": 3, "lost": [1], "joined": [], "detect_ms": 1.5, "fence_ms": 2, "agree_ms": 3, "load_ms": 4}
        | {"compile_ms": 0, "rebuild_ms": 5, "resume_ms": 6, "pause_ms": None}
    ],
}


class FakeAdmin(rpc.AdminServicer):
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        return pb.StatusResponse(json=json.dumps(STATUS))

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainResponse:
        if request.host == "x":
            context.abort(grpc.StatusCode.NOT_FOUND, "host: found 'x', expected one of a, b")
        if request.host == "a":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "host a: too few slots")
        return pb.DrainResponse(ranks=[] if request.host == "gone" else [2, 3], epoch=7)

    def Rebalance(self, request: pb.RebalanceRequest, context: grpc.ServicerContext) -> pb.RebalanceResponse:
        return pb.RebalanceResponse(slots=12, epoch=9)

    def Undrain(self, request: pb.UndrainRequest, context: grpc.ServicerContext) -> pb.UndrainResponse:
        if request.host == "a":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "host a: its workers are not started from here")
        return pb.UndrainResponse(ranks=[2, 3], epoch=8)


class FakeCluster(cluster_pb2_grpc.ClusterServicer):
    """Wants nobody."""

    def Control(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[cluster_pb2.CoordinatorMessage]:
        hello = next(request_iterator).hello
        reason = f"rank {hello.rank} of {hello.host} is not wanted"
        yield cluster_pb2.CoordinatorMessage(dismiss=cluster_pb2.Dismiss(reason=reason))


@pytest.fixture(scope="module")
def coordinator() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_AdminServicer_to_server(FakeAdmin(), server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(FakeCluster(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_status(coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", coordinator, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS
    assert main(["status", "--address", coordinator]) == 0
    shown = capsys.readouterr().out
    assert "SERVING, epoch 3" in shown and "8 experts in 6 slots a layer, 0 missing" in shown
    assert re.search(r"1 +b +lost +– +–", shown) and re.search(r"3 +1 +– +2 +2 +3 +4 +0 +5 +6 +–", shown)


def test_drain(coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drain", "b", "--address", coordinator, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"host": "b", "ranks": [2, 3], "epoch": 7}
    assert main(["drain", "b", "--address", coordinator]) == 0
    assert capsys.readouterr().out == "b: ranks 2 3 left; the cluster is in epoch 7\n"
    assert main(["drain", "x", "--address", coordinator]) == 2
    assert capsys.readouterr().err == "moe-jax drain: host: found 'x', expected one of a, b\n"
    assert main(["drain", "a", "--address", coordinator]) == 1
    assert "FAILED_PRECONDITION: host a: too few slots" in capsys.readouterr().err
    assert main(["drain", "gone", "--address", coordinator]) == 0
    assert capsys.readouterr().out == "gone: no ranks left; the cluster is in epoch 7\n"


def test_rebalance(coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rebalance", "--address", coordinator, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"slots": 12, "epoch": 9}
    assert main(["rebalance", "--address", coordinator]) == 0
    assert capsys.readouterr().out == "12 slots hold another expert now, in epoch 9\n"


def test_the_load_is_written_where_plan_reads_it(
    coordinator: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["status", "--address", coordinator, "--load", str(tmp_path / "load.json")]
    monkeypatch.setitem(STATUS, "load", [])
    assert main(asked) == 1
    assert "no tokens have been counted yet" in capsys.readouterr().err
    monkeypatch.setitem(STATUS, "load", [[1.5, 2.0], [3.0, 0.0]])
    assert main([*asked, "--json"]) == 0
    assert "load" not in json.loads(capsys.readouterr().out)
    assert read_load(tmp_path / "load.json").tolist() == [[1.5, 2.0], [3.0, 0.0]]


def test_undrain(coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["undrain", "b", "--address", coordinator]) == 0
    assert capsys.readouterr().out == "b: ranks 2 3 serve; the cluster is in epoch 8\n"
    assert main(["undrain", "a", "--address", coordinator]) == 1
    assert "its workers are not started from here" in capsys.readouterr().err


def test_worker(coordinator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--coordinator", coordinator, "--rank", "3", "--host", "b"]) == 75
    assert "dismissed: rank 3 of b is not wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ("status --address 127.0.0.1:1", 1, "127.0.0.1:1: UNAVAILABLE"),
        ("serve --model nowhere", 2, "nowhere"),
        ("serve --hosts 2 --replication 3", 2, "replication"),
        ("serve --address TAKEN", 1, "cannot listen there"),
        ("serve --address 127.0.0.1:0 --journal BROKEN", 2, "move it away"),
    ],
)
def test_cluster_commands_fail_in_one_line(
    argv: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "journal.sqlite").write_text("this is no journal at all")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(argv.replace("TAKEN", address).replace("BROKEN", str(tmp_path)).split()) == code
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err.splitlines()[-1] and "Traceback" not in captured.err


@contextmanager
def served(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(`moe-jax serve` as a process, the address that it says it serves at)."""
    command = [sys.executable, "-m", "serving.cli", "serve", "--address", "127.0.0.1:0", *argv]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.fullmatch(r"serving at (\S+): coordinator (\d+), engines \d+ \d+\n", line)
            assert found is not None and ("--journal" in argv) == (int(found[2]) != server.pid), line
            yield server, found[1]
        finally:
            server.kill()  # what it started ends with it


def family(pid: int) -> set[int]:
    """A process and all that it and its descendants have started and not outlived."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def resume(inference: Any, request_id: str, responses: list[Any]) -> None:
    """Go on behind what has come. Again, while calls still take the connection to the coordinator that is no more."""
    deadline = time.monotonic() + 60
    while True:
        request = pb.ResumeRequest(request_id=request_id, offset=sum(len(r.token_ids) for r in responses))
        try:
            responses += inference.Resume(request, wait_for_ready=True)
            return
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() < deadline, e


def until_whole(status: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while True:
        found = status()
        if all(rank["state"] == "live" for rank in found["ranks"]):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


# As in test_launcher.py, so that their programs are the same.
SMALL = ("--hosts", "2", "--max-batch", "16", "--max-prefill-rows", "32")


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--log-dir", str(tmp_path / "logs"), "--journal", str(tmp_path))
    with served(*SMALL, *argv) as (server, address), grpc.insecure_channel(address) as channel:
        inference = rpc.InferenceStub(channel)

        def status() -> dict[str, Any]:
            assert main(["status", "--address", address, "--json"]) == 0
            return json.loads(capsys.readouterr().out)

        params = pb.SamplingParams(max_tokens=200, temperature=0.8, seed=1, ignore_eos=True)
        asked = [pb.GenerateRequest(prompt=prompt, params=params) for prompt in ("The capital of", "Once upon a time")]
        alone = [inference.Complete(a) for a in asked]
        calls = [inference.Generate(a) for a in asked]
        got = [[next(call) for _ in range(5)] for call in calls]
        os.kill(status()["ranks"][1]["pid"], signal.SIGKILL)
        for call, responses, a in zip(calls, got, alone, strict=True):
            responses += call
            assert [t for r in responses for t in r.token_ids] == list(a.token_ids) and len(a.token_ids) == 200
            assert "".join(r.text for r in responses) == a.text
        recoveries = status()["recoveries"]
        assert recoveries[0]["lost"] == [1] and recoveries[0]["pause_ms"] is not None
        before = until_whole(status)
        call = inference.Generate(pb.GenerateRequest(request_id="r", prompt=asked[0].prompt, params=params))
        responses = [next(call) for _ in range(5)]
        os.kill(before["coordinator"]["pid"], signal.SIGKILL)
        with suppress(grpc.RpcError):
            responses += call
        resume(inference, "r", responses)
        assert [t for r in responses for t in r.token_ids] == list(alone[0].token_ids)
        assert "".join(r.text for r in responses) == alone[0].text
        after = until_whole(status)
        assert after["coordinator"]["took_over"] == [0, 1] and after["epoch"] == before["epoch"]
        assert [r["pid"] for r in after["ranks"]] == [r["pid"] for r in before["ranks"]]
        started = family(server.pid)
        assert len(started) >= 5  # itself, the JAX service, two workers, an engine or two
        call = inference.Generate(asked[1])
        responses = [next(call)]
        server.terminate()
        responses += call  # what was accepted is served
        assert "".join(r.text for r in responses) == alone[1].text
        assert server.wait(20) == 0
        started.add(after["service_pid"])  # its parent was the first coordinator
        deadline = time.monotonic() + 5
        while left := [pid for pid in started if alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    assert {f.name for f in (tmp_path / "logs").iterdir()} == {"rank0.log", "rank1.log"}


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_serve_with_workers_that_are_started_elsewhere(tmp_path: Path) -> None:
    """Its coordinator is started again, too, and it lets requests finish; workers learn of its end."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    command, given = [sys.executable, "-m", "serving.cli"], ["--address", address, *SMALL]
    server = subprocess.Popen([*command, "serve", *given, "--workers", "none", "--journal", str(tmp_path)], cwd=ROOT)
    workers = [
        subprocess.Popen(
            [*command, "worker", "--coordinator", address, "--rank", str(r), "--host", f"host{r}"], cwd=ROOT
        )
        for r in range(2)
    ]
    try:
        with grpc.insecure_channel(address) as channel:
            admin, inference = rpc.AdminStub(channel), rpc.InferenceStub(channel)

            def serving(took_over: list[int]) -> dict[str, Any]:
                while True:
                    with suppress(grpc.RpcError):  # it is killed just then
                        found = json.loads(admin.Status(pb.StatusRequest(), wait_for_ready=True).json)
                        if found["state"] == "SERVING" and found["coordinator"]["took_over"] == took_over:
                            return found
                    time.sleep(0.1)

            before = serving([])
            os.kill(before["coordinator"]["pid"], signal.SIGKILL)
            after = serving([0, 1])
            assert [r["pid"] for r in after["ranks"]] == [r["pid"] for r in before["ranks"]]
            with pytest.raises(grpc.RpcError, match="not started from here"):
                admin.Undrain(pb.UndrainRequest(host="host0"))
            params = pb.SamplingParams(max_tokens=200, seed=1, ignore_eos=True)
            call = inference.Generate(pb.GenerateRequest(prompt="Once upon a time", params=params), wait_for_ready=True)
            responses = [next(call)]
            server.terminate()
            responses += call
            assert responses[-1].usage.completion_tokens == 200
        assert server.wait(20) == 0 and [worker.wait(20) for worker in workers] == [75, 75]
    finally:
        for process in (server, *workers):
            process.kill()
            process.wait()
