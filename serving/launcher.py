"""`ClusterBackend`: what `LLM` uses with several hosts. One engine process a rank, all on this machine.

This process holds no device. It checks requests, places each on the least loaded rank, rings the doorbell, and gathers
the tokens. The membership is fixed: a lost process is an error that ends all of them.

A request goes to one rank's channel, and after it a bell, a number that only grows, to every rank's; the engines do the
rest (moe_jax.engine). An engine whose rank has no work waits inside a step as soon as any has, so all must be woken.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from moe_jax.checkpoint import CheckpointError, open_checkpoint
from moe_jax.config import ConfigError
from moe_jax.llm import engine_config
from moe_jax.request import Request, TokenEvent
from moe_jax.scheduler import Limits, QueueFull
from serving.channel import ChannelClosed, Message
from serving.child import Child, end
from serving.environment import compilation_cache, engine_environment, guess_platform, with_packages
from serving.messages import pack_request, unpack_event

_SETTLE = 1.0  # seconds in which the processes that a first failure takes along are expected to end


@dataclass
class Placed:
    """A request that is being served."""

    number: int
    request: Request
    rank: int
    tokens: int  # known: prompt and output


@dataclass
class Rank:
    """What this process knows of one engine."""

    child: Child
    outstanding: int = 0  # requests
    tokens: int = 0  # of these
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last one of each type


@dataclass
class Score:
    """Log-probabilities that are on their way."""

    rows: list[np.ndarray] = field(default_factory=list)
    done: bool = False
    error: str | None = None


class ClusterBackend:
    """`hosts` × `ranks_per_host` engine processes. One thread at a time may use it, any thread may build it.

    Options beside those of EngineConfig: startup_timeout and stall_timeout, seconds that starting may take and that
    work may stand still, and cache_dir, where compiled programs are kept. A process that ends, stands still, or says
    something went wrong is a RuntimeError that names the rank and quotes its log; nothing runs any more then.
    """

    def __init__(self, path: Path, hosts: int, ranks_per_host: int, load_format: Any, options: dict[str, Any]) -> None:
        """Raises CheckpointError and ConfigError as LocalBackend does."""
        options = dict(options)
        startup = _seconds("startup_timeout", options.pop("startup_timeout", None), 300.0)
        self._stall = _seconds("stall_timeout", options.pop("stall_timeout", None), 120.0)
        cache_dir = options.pop("cache_dir", None)
        num_ranks = hosts * ranks_per_host
        platform = guess_platform(jax.config.jax_platforms)  # type: ignore[attr-defined]
        self.model = open_checkpoint(path, load_format).config
        self.config = c = engine_config(self.model, num_ranks, platform, **options)
        self._limits = Limits.of(c)
        self._ranks: list[Rank] = []
        self._placed: dict[str, Placed] = {}  # by request id
        self._by_number: dict[int, Placed] = {}
        self._scores: dict[int, Score] = {}
        self._events: list[TokenEvent] = []  # received, and not yet polled
        self._next_number = 0
        self._bell = 0
        self._failure: str | None = None
        self._heard = time.monotonic()
        self._cluster = _Cluster()
        # Ends the processes when this object is collected or the interpreter exits, but not in a fork of it.
        self._finalizer = weakref.finalize(self, self._cluster.close, os.getpid())
        try:
            deadline = time.monotonic() + startup
            with _cache_lock(compilation_cache(platform, cache_dir, os.environ), deadline) as cache:
                start = {
                    "config": asdict(c),
                    "path": str(Path(path).resolve()),
                    "load_format": load_format,
                    "num_nodes": num_ranks,
                    "timeout": startup,
                    "cache": None if cache is None else str(cache),
                    "share_programs": platform == "cpu",  # elsewhere programs may be tuned to their device
                }
                environments = [engine_environment(r, platform, os.environ) for r in range(num_ranks)]
                self._start(start, environments, deadline)
        except BaseException:
            self.close()
            raise

    # Backend

    def submit(self, request: Request) -> None:
        """Raises ValueError for what can never be served, QueueFull for what cannot be now."""
        self._check_open()
        if request.request_id in self._placed:
            raise ValueError(f"request_id: found {request.request_id!r}, which is being served, expected a new one")
        self._limits.check(request)
        index = self._least_loaded()
        rank, tokens = self._ranks[index], len(request.token_ids) + len(request.output_ids)
        if rank.tokens + tokens > self._limits.max_waiting_tokens:
            raise QueueFull(
                f"queue: found {rank.tokens} tokens on the least loaded rank and {tokens} more, "
                f"expected at most {self._limits.max_waiting_tokens}: try again later"
            )
        if not self._placed:
            self._heard = time.monotonic()
        placed = Placed(self._number(), request, index, tokens)
        self._placed[request.request_id] = self._by_number[placed.number] = placed
        rank.outstanding += 1
        rank.tokens += tokens
        self._tell(index, {"type": "add", "request": pack_request(placed.number, request)})
        self._ring()
        self._receive(0.0)  # so that engines do not wait for a caller who submits much before he polls

    def cancel(self, request_id: str) -> None:
        placed = self._placed.get(request_id)
        if placed is None or self._failure is not None or not self._finalizer.alive:
            return
        self._forget(placed)
        self._events = [e for e in self._events if e.request_id != request_id]
        self._tell(placed.rank, {"type": "cancel", "number": placed.number})

    def poll(self, timeout: float | None) -> list[TokenEvent]:
        """New tokens; blocks until there are some, at most `timeout` seconds, and not when nothing is being served."""
        self._check_open()
        self._receive(0.0)
        if self._placed and not self._events:
            self._wait(lambda: bool(self._events), timeout)
        events, self._events = self._events, []
        return events

    def score(self, token_ids: Sequence[int], chunk: int | None) -> np.ndarray:
        self._check_open()
        number, score = self._number(), Score()
        self._scores[number] = score
        self._heard = time.monotonic()
        body = {"type": "score", "number": number, "token_ids": [int(t) for t in token_ids], "chunk": chunk}
        try:
            self._tell(self._least_loaded(), body)
            self._ring()
            self._wait(lambda: score.done)
        finally:
            del self._scores[number]
        if score.error is not None:
            raise ValueError(score.error)
        return np.concatenate(score.rows)

    def close(self) -> None:
        """End all processes, within seconds. May be called twice."""
        self._finalizer()
        self._placed.clear()

    # For tests and tools

    def status(self) -> list[dict[str, Any]]:
        """What each engine says of itself now: compilations, steps, level, bells, whether it is parked."""
        return self._ask({"type": "status"}, "status", self._stall)

    def compilations(self) -> list[int]:
        """Programs that each rank has compiled or loaded from the cache so far."""
        return [answer["compilations"] for answer in self.status()]

    @property
    def pids(self) -> list[int]:
        """Of the engine processes, by rank."""
        return [rank.child.process.pid for rank in self._ranks]

    @property
    def startup_seconds(self) -> list[dict[str, float]]:
        """How long each rank took to join, load, and compile."""
        return [rank.answers["ready"]["seconds"] for rank in self._ranks]

    # Starting

    def _start(self, start: dict[str, Any], environments: list[dict[str, str]], deadline: float) -> None:
        cluster, size = self._cluster, len(environments)
        for r, environ in enumerate(environments):  # first: they import while the service starts
            engine = cluster.add(f"rank {r}", "serving.engine_process", [str(r), "{fd}"], environ, self._stall)
            self._ranks.append(Rank(engine))
        environ = with_packages({**os.environ, "JAX_PLATFORMS": "cpu"})
        service = cluster.add("JAX service", "serving.jax_service", ["{fd}", str(size)], environ, self._stall)
        self._service = Rank(service)
        self._wait(lambda: "address" in self._service.answers, deadline - time.monotonic(), "start the JAX service")
        start = start | {"type": "start", "address": self._service.answers["address"]["address"]}
        self._ask(start, "joined", deadline - time.monotonic())
        self._ask({"type": "epoch", "number": 1, "ranks": list(range(size))}, "ready", deadline - time.monotonic())

    # Talking

    def _ask(self, question: dict[str, Any], answer: str, timeout: float) -> list[dict[str, Any]]:
        """Every rank's answer."""
        self._check_open()
        for index, rank in enumerate(self._ranks):
            rank.answers.pop(answer, None)
            self._tell(index, question)
        self._wait(lambda: all(answer in rank.answers for rank in self._ranks), timeout, question["type"])
        return [rank.answers[answer] for rank in self._ranks]

    def _ring(self) -> None:
        self._bell += 1
        for index in range(len(self._ranks)):
            self._tell(index, {"type": "bell", "bell": self._bell})

    def _tell(self, index: int, body: dict[str, Any]) -> None:
        child = self._ranks[index].child
        try:
            child.channel.send(body)
        except ChannelClosed:
            self._fail(child)
        except TimeoutError:
            self._fail(child, f"did not listen for {self._stall:g} s")

    def _wait(self, done: Callable[[], bool], timeout: float | None = None, doing: str | None = None) -> None:
        """Receive until `done()`. After `timeout` seconds that is an error if `doing` says what took so long.

        Without a word from any rank for stall_timeout it is one in any case, starting apart: compiling is silent.
        """
        begun = time.monotonic()
        while not done():
            now = time.monotonic()
            left = None if timeout is None else begun + timeout - now
            if left is not None and left <= 0:
                if doing is None:
                    return
                self._fail(None, f"{doing}: not done after {timeout:g} s")
            silent = self._heard + self._stall - now
            if doing is None and silent <= 0:
                self._fail(None, f"no step was done for {self._stall:g} s while work is waiting")
            asked = max(0.0, min(x for x in (left, silent if doing is None else None) if x is not None))
            self._receive(asked)
            if time.monotonic() - now > asked + 1:
                self._heard = time.monotonic()  # this process stood still itself, and can judge nobody

    def _receive(self, timeout: float) -> None:
        """Take in what has arrived, waiting up to `timeout` seconds for something."""
        poller = select.poll()
        by_fd = {rank.child.channel.fileno(): rank for rank in (*self._ranks, self._service)}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(timeout * 1000):
            rank = by_fd[fd]
            try:
                messages = rank.child.channel.receive()
            except ChannelClosed:
                self._fail(rank.child)
            except ValueError as e:
                self._fail(rank.child, f"sent what is no message ({e})")
            for message in messages:
                self._heard = time.monotonic()
                self._take(rank, message)

    def _take(self, rank: Rank, message: Message) -> None:
        body = message.body
        match body["type"]:
            case "events":
                for packed in body["events"]:
                    self._take_event(packed)
            case "score":
                score = self._scores.get(body["number"])
                if score is None:
                    return  # nobody waits any more
                if "shape" in body:
                    score.rows.append(np.frombuffer(message.blob, np.float32).reshape(body["shape"]))
                else:
                    score.done, score.error = True, body.get("error")
            case "error":
                self._fail(rank.child, body["message"], body["kind"])
            case answer:
                rank.answers[answer] = body

    def _take_event(self, packed: list[Any]) -> None:
        placed = self._by_number.get(packed[0])
        if placed is None:
            return  # cancelled while this was on its way
        event = unpack_event(packed, placed.request.request_id)
        self._events.append(event)
        placed.tokens += 1
        self._ranks[placed.rank].tokens += 1
        if event.finish_reason is not None:
            self._forget(placed)

    # Requests

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _least_loaded(self) -> int:
        return min(range(len(self._ranks)), key=lambda i: (self._ranks[i].outstanding, self._ranks[i].tokens))

    def _forget(self, placed: Placed) -> None:
        del self._placed[placed.request.request_id], self._by_number[placed.number]
        rank = self._ranks[placed.rank]
        rank.outstanding -= 1
        rank.tokens -= placed.tokens

    # Failing

    def _check_open(self) -> None:
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is closed")

    def _fail(self, witness: Child | None, said: str | None = None, kind: str = "") -> NoReturn:
        """End everything and raise the error of the process that caused it.

        `witness` is where trouble was first seen. A lost process takes the others along within moments, and any of
        them may be heard first, so one that a signal ended is to blame before one that failed by itself.
        """
        children = self._cluster.children
        deadline = time.monotonic() + _SETTLE
        while not any(c.killed for c in children) and not all(c.ended for c in children):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        culprit = next((c for c in children if c.killed or c.stopped), witness)
        if culprit is None:
            self._failure = f"{said}; ended all processes"
        else:
            self._failure = culprit.describe(said)
        self.close()
        errors = {"CheckpointError": CheckpointError, "ConfigError": ConfigError}
        if culprit is witness and witness is not None and kind in errors:
            raise errors[kind](f"{witness.name}: {said}")
        raise RuntimeError(self._failure)


class _Cluster:
    """The processes, apart from `ClusterBackend` so that a finalizer can hold them."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def add(self, name: str, module: str, arguments: list[str], environ: dict[str, str], timeout: float) -> Child:
        self.children.append(Child(name, module, arguments, environ, timeout))
        return self.children[-1]

    def close(self, owner: int) -> None:
        """End all, in the process `owner` that started them."""
        if os.getpid() == owner:
            end(self.children)


@contextlib.contextmanager
def _cache_lock(directory: Path, deadline: float) -> Iterator[Path | None]:
    """`directory`, made if need be, for us alone until the end of the block; None if it cannot be written.

    Ranks that look for a program while another cluster adds it would disagree on whether it is there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as e:
        warnings.warn(f"{directory}: compiled programs cannot be kept there ({e.strerror})", stacklevel=4)
        yield None
        return
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{directory}: in use by another cluster that is starting") from None
                time.sleep(0.05)
        yield directory


def _seconds(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: found {value!r}, expected seconds above 0")
    return float(value)
