"""A cluster as its users have it: started by `moe-jax serve`, spoken to over gRPC, killed by its process ids.

Shared by chaos.py and bench_recovery.py. It knows of the cluster what status tells, and of tokens what clients see.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import grpc
from _shapes import add_model_options, write_model

from serving.access import TOKEN_VARIABLE
from serving.environment import guess_platform
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

START = 600.0  # seconds; the first start of a configuration compiles
_LOOK = 0.05  # seconds between two looks at the status
_AGAIN = 0.1  # seconds from a broken connection to trying again
_GRPC = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)
_BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # the connection, not the request
_PROMPTS = (
    "The capital of",
    "My fellow citizens,",
    "Once upon a time",
    "In Python, a list is",
    "It was a dark and stormy night, and",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Call me Ishmael. Some years ago",
    "The function returns a dictionary that",
    "An ocean is",
    "The President of the United States shall",
    "She was a woman of mean understanding, little information, and uncertain temper.",
    "To raise an exception,",
    "There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs",
    "The first law of",
    "Congress has the power to",
    "He looked at the sea, and then",
)


@dataclass(frozen=True)
class Shape:
    """What a cluster is: options of `moe-jax serve`. None leaves it its own."""

    hosts: int
    ranks_per_host: int = 1
    slots: int | None = None
    replication: int | None = None
    max_batch: int | None = None
    model: str = "demo"
    load_format: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    max_prefill_rows: int | None = None
    num_pages: int | None = None
    deterministic: bool | None = None

    @staticmethod
    def of(args: argparse.Namespace, directory: Path) -> Shape:
        """What was given for `add_shape_options`. directory: where a model of random weights is described."""
        given = vars(args)
        shape = Shape(**{f.name: given[f.name] for f in fields(Shape) if f.name in given})
        if args.shape == "demo" and args.layers is None:
            return shape
        model = write_model(args.shape, args.layers, directory / "model")
        return replace(
            shape,
            model=str(model),
            load_format="dummy",
            max_model_len=shape.max_model_len or 2048,
            max_batch=shape.max_batch or -(-args.streams // 16) * 16,
        )

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    def options(self) -> dict[str, Any]:
        """Of `LLM`, but for the model and how many it runs on."""
        rest = {"hosts", "ranks_per_host", "model"}
        return {name: value for name, value in vars(self).items() if value is not None and name not in rest}

    def arguments(self) -> list[str]:
        """Of `moe-jax serve`."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        flags = [f"--{name}" if value else f"--no-{name}" for name, value in given.items() if isinstance(value, bool)]
        valued = {name: value for name, value in given.items() if not isinstance(value, bool)}
        return flags + [word for name, value in valued.items() for word in (f"--{name}", str(value))]

    @property
    def on_cpu(self) -> bool:
        return guess_platform(os.environ.get("JAX_PLATFORMS")) == "cpu"

    @property
    def exact(self) -> bool:
        """Whether a request gives the same bits wherever and with whatever it runs, so that it is known beforehand."""
        return (self.on_cpu and self.load_format is None) if self.deterministic is None else self.deterministic

    def __str__(self) -> str:
        each = f" of {self.ranks_per_host} ranks" if self.ranks_per_host > 1 else ""
        return f"{self.hosts} hosts{each}"


def add_shape_options(parser: argparse.ArgumentParser, hosts: int) -> None:
    """And those of `_shapes.add_model_options`. The script has one more, --streams."""
    group = parser.add_argument_group("cluster")
    add_model_options(group)
    group.add_argument("--hosts", type=int, default=hosts)
    group.add_argument("--ranks-per-host", type=int, default=1)
    group.add_argument("--slots", type=int, help="expert slots per layer and rank")
    group.add_argument("--replication", type=int, help="hosts that hold each expert")
    group.add_argument("--max-batch", type=int, help="requests decoded at once by a rank")
    group.add_argument("--max-prefill-rows", type=int, help="prompt tokens that a rank takes in one step")
    group.add_argument("--max-model-len", type=int, help="longest prompt and output together, in tokens")
    group.add_argument("--num-pages", type=int, help="pages of a rank's KV cache")
    group.add_argument("--dtype", choices=("float32", "bfloat16"))
    group.add_argument("--deterministic", action="store_true", default=None, help="also on a GPU: tokens are compared")


def machine() -> dict[str, Any]:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": found[1] if found else platform.processor(),
        "cores": cores,
        "jax": importlib.metadata.version("jax"),
    }


# What is asked


@dataclass(frozen=True)
class Job:
    """A request whose tokens are known beforehand: it is greedy, or it has a seed."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def request(self, request_id: str) -> pb.GenerateRequest:
        params = pb.SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, ignore_eos=True
        )
        return pb.GenerateRequest(request_id=request_id, prompt=self.prompt, params=params)


@dataclass(frozen=True)
class Output:
    tokens: tuple[int, ...]
    text: str
    finish_reason: str


def make_jobs(count: int, seed: int, shortest: int = 100, longest: int = 200) -> list[Job]:
    """Half of them greedy, half sampled."""
    draw = random.Random(seed)
    return [
        Job(_PROMPTS[i % len(_PROMPTS)], draw.randint(shortest, longest), 0.8 * (i // len(_PROMPTS) % 2), seed + i)
        for i in range(count)
    ]


def expected_outputs(jobs: Sequence[Job], shape: Shape) -> dict[Job, Output]:
    """What each job gives where nothing happens: on one host, with GPUs on as many as the cluster has. On the way the
    programs of a cluster of this shape are compiled, on a CPU for every number of ranks, so that what is measured later
    is no first start.

    In a process of its own, which ends: JAX stays out of this one. Nothing where nothing can be known (`Shape.exact`).
    """
    if not shape.exact:
        return {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_expect, tuple(jobs), shape).result()


def _expect(jobs: Sequence[Job], shape: Shape) -> dict[Job, Output]:
    from moe_jax import LLM, SamplingParams

    options = shape.options()
    if shape.on_cpu:
        _compile(shape)
        where = {"hosts": 1}
        for name in ("slots", "replication"):  # are of several hosts
            options.pop(name, None)
    else:
        where = {"hosts": shape.hosts, "ranks_per_host": shape.ranks_per_host}
    unlike = list(dict.fromkeys(jobs))
    params = [
        SamplingParams(max_tokens=j.max_tokens, temperature=j.temperature, seed=j.seed, ignore_eos=True) for j in unlike
    ]
    with LLM(shape.model, **where, **options) as llm:
        outputs = [out.outputs[0] for out in llm.generate([j.prompt for j in unlike], params)]
    return {j: Output(tuple(o.token_ids), o.text, o.finish_reason or "") for j, o in zip(unlike, outputs, strict=True)}


def _compile(shape: Shape) -> None:
    from moe_jax.config import EngineConfig
    from moe_jax.llm import model_directory
    from moe_jax.warmup import Spec, ensure
    from serving import server

    engine = shape.options()
    load_format = engine.pop("load_format", "auto")
    model = model_directory(shape.model)
    options = server.Options(model, "", "cpu", shape.hosts, shape.ranks_per_host, load_format, engine)
    start = server.prepare(options)[0].start
    if start["cache"] is not None:
        config = EngineConfig(**start["config"])
        spec = Spec(start["path"], start["load_format"], config, start["cache"])
        ensure(spec, range(config.ranks, 0, -1), START, lambda entry: None)


# Those who ask


@dataclass
class Stream:
    """What a client has seen of one request."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str = ""
    begun: float = field(default_factory=time.monotonic)
    last: float | None = None  # when its last token came
    lost: int = 0  # tokens, by the offsets that the server says
    duplicated: int = 0


@dataclass
class Tally:
    """What became of the streams. All but the first three should stay 0."""

    streams: int = 0
    tokens: int = 0
    compared: int = 0  # streams
    lost: int = 0  # tokens
    duplicated: int = 0
    changed: int = 0
    texts: int = 0  # whose text or finish reason differs though the tokens are the same
    errors: int = 0  # streams that ended with a status
    hung: int = 0  # streams without a token for too long
    details: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        changed = f"{self.changed} changed, {self.texts} texts differ" if self.compared else "not compared"
        return (
            f"{self.streams} streams, {self.tokens} tokens: {self.lost} lost, {self.duplicated} duplicated, "
            f"{self.errors} errors, {self.hung} hung; {changed}"
        )

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.changed or self.texts or self.errors or self.hung)

    def judge(self, stream: Stream, expected: Output | None, request_id: str) -> None:
        """A stream that has ended as it should. Without `expected`, what counts is how many tokens it has."""
        found, most = stream.tokens, stream.job.max_tokens
        wanted = [*found, *[-1] * most][:most] if expected is None else expected.tokens
        lost = stream.lost + max(0, len(wanted) - len(found))
        duplicated = stream.duplicated + max(0, len(found) - len(wanted))
        changed = sum(a != b for a, b in zip(found, wanted, strict=False))
        self.streams += 1
        self.compared += expected is not None
        self.lost += lost
        self.duplicated += duplicated
        self.changed += changed
        if lost or duplicated or changed:
            first = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
            self.note(f"{request_id}: {lost} lost, {duplicated} duplicated, {changed} changed, the first at {first}")
        elif expected is None:
            return
        elif "".join(stream.text) != expected.text or stream.finish_reason != expected.finish_reason:
            self.texts += 1
            self.note(f"{request_id}: its tokens are right, but not its text or finish reason {stream.finish_reason!r}")

    def note(self, text: str) -> None:
        if len(self.details) < 50:
            self.details.append(text)


class Traffic:
    """`width` streams at any time: a new one starts as one ends, until `stop`. Job after job, over and over."""

    def __init__(
        self,
        address: str,
        jobs: Sequence[Job],
        expected: dict[Job, Output],
        width: int,
        hang: float,
        retry: bool = False,
        resume: bool = False,
        once: bool = False,
        ended: Callable[[Stream], None] = lambda stream: None,
        name: str = "stream",
    ) -> None:
        """hang: seconds without a token after which a stream is given up. retry: ask again when a stream breaks, as a
        client does whose server was restarted; resume: go on where it broke. Otherwise that is an error. once: no
        stream begins when another ends. ended: is given each stream that came to its end.
        name: of the requests; a cluster answers one that it has seen with what it gave then."""
        self._jobs, self._expected, self._width, self._hang, self._retry = jobs, expected, width, hang, retry
        self._resume, self._once, self._ended, self._name = resume, once, ended, name
        self.resumed = 0  # times
        self._channel = grpc.aio.insecure_channel(address, options=_GRPC)
        self._stub = rpc.InferenceStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping, self._number = False, 0
        self._running: dict[str, Stream] = {}
        self._gaps: deque[tuple[float, float]] = deque(maxlen=1 << 18)  # between two tokens of one stream
        self.tally = Tally()
        self.last = 0.0  # when the last token of any stream came

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow_jobs()) for _ in range(self._width)]

    async def stop(self) -> None:
        """Begin nothing more, `once` apart, and wait for what runs."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._channel.close()

    async def rest(self, seconds: float) -> None:
        """Begin nothing more, and again so many seconds after the last stream has ended."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(seconds)
        self._stopping = False
        self.start()

    def clear(self) -> None:
        """Forget the gaps up to now."""
        self._gaps.clear()

    @property
    def running(self) -> int:
        """Streams, now."""
        return len(self._running)

    def gaps(self, since: float, until: float) -> list[tuple[float, float]]:
        """(begin, end) of those that began before `until` and ended after `since`."""
        return [(begin, end) for begin, end in self._gaps if begin < until and end > since]

    def longest_gap(self, since: float, until: float) -> float | None:
        """Seconds, of `gaps`. None: there is none."""
        return max((end - begin for begin, end in self.gaps(since, until)), default=None)

    def longest_gap_after(self, since: float) -> float | None:
        """Seconds, of the gaps that began later."""
        return max((end - begin for begin, end in self._gaps if begin > since), default=None)

    def timeline(self, since: float, until: float, width: float) -> list[float]:
        """Tokens per second of all streams, in windows of `width` seconds."""
        counts = [0] * max(1, int((until - since) / width))
        for _, end in self._gaps:
            if 0 <= (i := int((end - since) / width)) < len(counts) and end >= since:
                counts[i] += 1
        return [count / width for count in counts]

    async def all_moved(self, since: float) -> None:
        """Until every stream that runs now has got a token after `since`, or has ended."""
        for request_id, stream in list(self._running.items()):
            while (stream.last or 0.0) < since and self._running.get(request_id) is stream:
                await asyncio.sleep(0.01)

    async def rate(self, seconds: float) -> float:
        """Tokens per second over the next `seconds`."""
        before, begun = self.tally.tokens, time.monotonic()
        await asyncio.sleep(seconds)
        return (self.tally.tokens - before) / (time.monotonic() - begun)

    async def _follow_jobs(self) -> None:
        while self._once or not self._stopping:
            number, self._number = self._number, self._number + 1
            job, request_id = self._jobs[number % len(self._jobs)], f"{self._name}-{number}"
            while await self._follow(job, request_id) and not self._stopping:
                await asyncio.sleep(0.05)
            if self._once:
                return

    async def _follow(self, job: Job, request_id: str) -> bool:
        """Whether it should be asked again."""
        stream = self._running[request_id] = Stream(job)
        call: Any = self._stub.Generate(job.request(request_id))
        try:
            async with asyncio.timeout(self._hang) as hang:
                while not stream.finish_reason:
                    try:
                        async for response in call:
                            self._take(stream, response)
                            hang.reschedule(asyncio.get_running_loop().time() + self._hang)
                    except grpc.aio.AioRpcError as e:
                        if not self._resume or e.code() not in _BROKEN:
                            raise
                        self.resumed += 1
                        await asyncio.sleep(_AGAIN)
                        again = pb.ResumeRequest(request_id=request_id, offset=len(stream.tokens))
                        # Whether it was accepted is not known before its first token.
                        if stream.tokens:
                            call = self._stub.Resume(again)
                        else:
                            call = self._stub.Generate(job.request(request_id))
            self.tally.judge(stream, self._expected.get(job), request_id)
            self._ended(stream)
        except TimeoutError:
            self.tally.hung += 1
            self.tally.note(f"{request_id}: hung after {len(stream.tokens)} of {job.max_tokens} tokens")
        except grpc.aio.AioRpcError as e:
            if self._retry:
                return True
            self.tally.errors += 1
            self.tally.note(f"{request_id}: {e.code().name} after {len(stream.tokens)} tokens: {e.details()}")
            await asyncio.sleep(0.2)
        finally:
            call.cancel()
            del self._running[request_id]
        return False

    def _take(self, stream: Stream, response: pb.GenerateResponse) -> None:
        now, count = time.monotonic(), len(response.token_ids)
        stream.lost += max(0, response.offset - len(stream.tokens)) if count else 0
        stream.duplicated += max(0, len(stream.tokens) - response.offset) if count else 0
        stream.tokens += response.token_ids
        stream.text.append(response.text)
        stream.finish_reason = response.finish_reason
        if count:
            if stream.last is not None:
                self._gaps.append((stream.last, now))
            stream.last = self.last = now
            self.tally.tokens += count


# The cluster


@dataclass(frozen=True)
class Resources:
    """Of one process. memory: MiB that are resident."""

    pid: int
    memory: int
    threads: int
    sockets: int

    @staticmethod
    def of(pid: int) -> Resources | None:
        """None when it is gone."""
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            if "VmRSS" in status:
                memory = int(status["VmRSS"].split()[0]) >> 10
                return Resources(pid, memory, int(status["Threads"]), _count_sockets(pid))
        return None


def _count_sockets(pid: int) -> int:
    count, directory = 0, f"/proc/{pid}/fd"
    for fd in os.listdir(directory):
        with contextlib.suppress(OSError):
            count += os.readlink(f"{directory}/{fd}").startswith("socket:")
    return count


def cpu(pids: Iterable[int]) -> float:
    """Seconds of processor time."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int) -> bool:
    """Also when it is stopped, but not as a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def send(pids: Iterable[int | None], number: int) -> None:
    for pid in pids:
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Cluster:
    """`moe-jax serve`, and all that it starts. Raises RuntimeError when it does not start."""

    def __init__(self, shape: Shape, directory: Path, restart: bool = True) -> None:
        """directory: for logs, of the coordinator and of each rank, and the journal. restart: of lost workers."""
        os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe())  # of workers that are started here, too
        self._arguments = [*shape.arguments(), *([] if restart else ["--no-restart"])]
        self.shape, self.directory = shape, directory
        self.address = "127.0.0.1:0"
        self._process: asyncio.subprocess.Process | None = None
        self._channel: grpc.aio.Channel | None = None
        self._admin: Any = None
        self._starts = 0

    async def __aenter__(self) -> Cluster:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Return when requests are served. After `kill` it is the same cluster once more, at the same address."""
        self._starts += 1
        self.directory.mkdir(parents=True, exist_ok=True)
        journal = self.directory / f"journal{self._starts}"
        kept = ["--address", self.address, "--journal", str(journal), "--log-dir", str(self.directory)]
        with (self.directory / "coordinator.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "serving.cli", "serve", *self._arguments, *kept),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START):
                line = (await self._process.stdout.readline()).decode()
        if not line.startswith("serving at "):
            await self.close()
            raise RuntimeError(f"moe-jax serve: found {line!r}, expected 'serving at …'\n{self.log_tail()}")
        self.address = line.removeprefix("serving at ").partition(": ")[0]
        self._channel = grpc.aio.insecure_channel(self.address, options=_GRPC)
        self._admin = rpc.AdminStub(self._channel)

    @property
    def pid(self) -> int:
        """Of the process that keeps the coordinator and the workers."""
        assert self._process is not None
        return self._process.pid

    def log_tail(self) -> str:
        return (self.directory / "coordinator.log").read_text(errors="replace")[-3000:]

    async def status(self) -> dict[str, Any]:
        return json.loads((await self._admin.Status(pb.StatusRequest(), timeout=30.0)).json)

    async def drain(self, host: str) -> None:
        await self._admin.Drain(pb.DrainRequest(host=host), timeout=60.0)

    async def until(
        self, done: Callable[[dict[str, Any]], Any], seconds: float, what: str, look: float = _LOOK
    ) -> dict[str, Any]:
        """The first status of which `done` is true, looked at every `look` seconds. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not done(status := await self.status()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds:g} s; {summary(status)}")
            await asyncio.sleep(look)
        return status

    async def until_settled(self, seconds: float, what: str) -> dict[str, Any]:
        """Until all ranks serve and the epoch has not changed for a second: what has been announced has happened."""
        deadline = time.monotonic() + seconds
        while True:
            before = await self.until(is_whole, deadline - time.monotonic(), what)
            await asyncio.sleep(1.0)
            status = await self.status()
            if is_whole(status) and status["epoch"] == before["epoch"]:
                return status

    async def processes(self) -> dict[str, int]:
        """Process ids by role."""
        status = await self.status()
        found: dict[str, Any] = {"launcher": self.pid, "coordinator": status["coordinator"]["pid"]}
        found["JAX service"] = status["service_pid"]
        for rank in status["ranks"]:
            found |= {f"supervisor {rank['rank']}": rank["supervisor_pid"], f"engine {rank['rank']}": rank["pid"]}
        return {role: pid for role, pid in found.items() if pid is not None}

    async def kill(self) -> None:
        """SIGKILL to everything at once."""
        assert self._process is not None
        send((await self.processes()).values(), signal.SIGKILL)
        await self._process.wait()
        await self._disconnect()

    async def close(self) -> None:
        await self._disconnect()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(40.0):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _disconnect(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def is_whole(status: dict[str, Any]) -> bool:
    """All ranks serve, or have been told to."""
    return status["state"] == "SERVING" and all(rank["state"] == "live" for rank in status["ranks"])


def summary(status: dict[str, Any]) -> str:
    ranks = ", ".join(f"{rank['rank']} {rank['state']}" for rank in status["ranks"])
    return f"{status['state']} {status['reason']} in epoch {status['epoch']}; ranks {ranks}"


def worker_command(coordinator: str, rank: int, host: str) -> list[str]:
    """A worker that no launcher looks after."""
    arguments = ["--coordinator", coordinator, "--rank", str(rank), "--host", host]
    return [sys.executable, "-m", "serving.cli", "worker", *arguments]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run, which SIGTERM ends as Ctrl-C does: by way of what `main` has to clean up, with exit code 130."""

    async def guarded() -> Any:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    try:
        return asyncio.run(guarded())
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(130)
