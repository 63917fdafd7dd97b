"""What an engine process does once its engine is built: obey the commands that have arrived, enter the epochs that are
announced, and unless parked take a step with the other ranks; on GPUs, while nobody has work, make ready what a loss
would leave.

Commands: epoch, abort, prefetch, add, cancel, bell, score, status, loads, adopt. Answers: arrived, entered, halted,
failed, prepared, prefetched, events, score, status, loads, adopted. Everything it has to say leaves through one
function, so a test can stand in for the process.

`adopt` comes from a coordinator that follows another one: drop all requests, and say which epoch this engine is in. It
is answered in the inbox's thread, for the main one may wait for ranks that are no more.

An epoch with `shrink` set is entered at once: its collectives' predecessors have been aborted, or there were none. Any
other is entered after the step at whose end all ranks know of it. `abort` is obeyed in the inbox's thread, because the
main one is inside the collective that is to be ended. It comes again, for the same epoch, when another rank is lost
before the next one is announced.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import jax
import numpy as np

from moe_jax.config import Bucket
from moe_jax.distributed import (
    Meetings,
    cut_collectives,
    device_is_lost,
    end_connecting,
    forget_communicator,
    open_sockets,
    ring,
    shield_collectives,
)
from moe_jax.engine import Engine, Experts, ScoreJob
from moe_jax.executables import compilations
from moe_jax.mesh import ExpertMesh
from moe_jax.request import TokenEvent
from serving import heap
from serving.channel import Message
from serving.inbox import Inbox
from serving.messages import pack_event, unpack_request

STUCK = 70  # exit code
HEARTBEAT = 1.0  # seconds: while steps go on, something is said at least this often
SCORE_BYTES = 16 << 20  # of log-probabilities in one message
_CUT_EVERY = 0.01  # seconds; sockets may still be opening while they are shut
_CUT_FOR = 2.0  # seconds; leaving takes some hundredths
_RING_OFTEN = 10  # times; then more seldom, for NCCL's threads have room for some dozens of callers
_RING_SELDOM = 0.04  # seconds
_END_CONNECTING = 3  # cuts after which a communicator that is being made is to be ended, too
_SHIELD_EVERY = 0.005  # seconds, while sockets may be opening
_BARRIER = 60.0  # seconds; the coordinator gives up on this rank before that
_SLOW = 5.0  # seconds of entering an epoch after which the log says where; some seconds later the coordinator gives up
_PREPARE_AFTER = 1.0  # seconds after a loss: until then the steps that make up for it have the machine
_TICK = 0.002
_SOON = 0.0005
_MEET = 1.0  # seconds that ranks wait for each other before a mesh is made ready
_CONNECTED = 8  # meshes made ready ahead in an epoch: each communicator takes memory on the device


class Aborted(RuntimeError):
    """The epoch that was being entered is over already."""


class EngineLoop:
    """Not thread-safe but for `urgent`: the inbox's thread otherwise only queues."""

    def __init__(self, engine: Engine, client: Any, service: str, rank: int, send: Callable[..., None]) -> None:
        """client and service: of the JAX service, and its address. `send` as Outbox.send."""
        self.engine, self.rank, self._client, self._service, self._send = engine, rank, client, service, send
        self._meetings = Meetings(client)
        self._scores: dict[int, ScoreJob] = {}
        self._fetched: Experts = {}
        self._epoch: dict[str, Any] | None = None  # announced, and not yet entered
        self._aborted = 0  # epochs up to this one are over
        self._survivors: set[int] = set()  # nodes that are left of them
        self._inside = 0  # the epoch in whose collectives the main thread is
        self._handed = 0  # what the engine had handed over when the main thread went inside
        self._gate = threading.Lock()  # held to change `_inside`, and to cut what is inside
        self._cut = 0.0  # when a cut was first asked for
        self._doomed: set[str] = set()  # sockets of the communicators that are aborted; on GPUs
        self._unready: deque[tuple[ExpertMesh, Bucket | None]] = deque()  # see `_make_ready`
        self._planned = False  # `_unready`, for the active mesh
        self._able: set[ExpertMesh] = set()  # those of them whose ranks all have the programs of a step
        self._active: ExpertMesh | None = None  # that of the last epoch entered
        self._sockets: dict[ExpertMesh, set[str]] = {}  # of the meshes' communicators; on GPUs
        self._connecting: ExpertMesh | None = None  # whose communicator is being made
        self._done: tuple[dict[str, Any], list[TokenEvent]] | None = None  # a step whose tokens have not been sent
        self._level = 0  # of the last step that was begun
        self._said = self._shielded = time.monotonic()
        self.about: Callable[[], dict[str, Any]] = dict  # what else to say to a new coordinator

    def run(self, inbox: Inbox) -> None:
        while True:
            for message in inbox.take(wait=self.idle):
                self.handle(message)
            self.advance()

    @property
    def idle(self) -> bool:
        """Whether nothing happens until a message arrives."""
        return self.engine.parked and not self._may_enter and not self._may_make_ready

    @property
    def _may_enter(self) -> bool:
        epoch, engine = self._epoch, self.engine
        if epoch is None:
            return False
        return epoch["shrink"] or engine.mesh is None or engine.epoch_agreed >= epoch["number"]

    def advance(self) -> None:
        """Enter an epoch, or take a step, if it is time."""
        if self._may_make_ready:  # even if the epoch is over: the others may not have heard, and wait for this rank
            self._make_ready()
        elif self.engine.mesh is not None and self._aborted >= self.engine.epoch:
            self.engine.leave()
        elif self._may_enter:
            self.enter()
        elif not self.engine.parked:
            self.step()
        if self.idle:
            self._tell()

    def handle(self, message: Message) -> None:
        """Obey one command. A request is sent before the bell that announces it, so whoever heard the bell has it."""
        body = message.body
        match body["type"]:
            case "epoch":
                if body["number"] > max(self.engine.epoch, self._aborted):
                    self._epoch = body
                    self.engine.epoch_heard = body["number"]
                    self.engine.bells_heard = max(self.engine.bells_heard, body["bell"])
            case "abort":
                pass  # `urgent` has seen it
            case "prefetch":
                threading.Thread(target=self._prefetch, args=(body,), name="prefetch", daemon=True).start()
            case "add":
                # The queue's bound is kept by the sender; here it would come too late to refuse.
                self.engine.add(0, unpack_request(body["request"]), accepted=True)
            case "cancel":
                self.engine.cancel(str(body["number"]))
                self._cancel_score(body["number"])
            case "bell":
                self.engine.bells_heard = max(self.engine.bells_heard, body["bell"])
            case "score":
                try:
                    self._scores[body["number"]] = self.engine.add_score(0, body["token_ids"], body["chunk"])
                except ValueError as e:
                    self._say({"type": "score", "number": body["number"], "error": str(e)})
            case "status":
                self._say({"type": "status", **self.status()})
            case "loads":  # answered after the next step if there is one: nothing waits for it
                self.engine.look_at_loads()
                if self.engine.parked:
                    self._send_loads()
            case "adopt":  # `urgent` has answered
                self._drop_requests()
            case other:
                raise ValueError(f"command: found {other!r}, expected one of those in the docstring of this module")

    # Epochs

    def urgent(self, message: Message) -> None:
        """In the inbox's thread, as soon as a message has arrived."""
        if message.body["type"] == "abort":
            self._cut = self._cut or time.monotonic()
            with self._gate:
                self._aborted = max(self._aborted, message.body["epoch"])
                self._survivors = set(message.body["survivors"])
            spared = self._spared(self._survivors)
            threading.Thread(target=self._cut_until_outside, args=(spared,), name="cut", daemon=True).start()
            if self.engine.programs.connects_ahead:
                self._doomed = open_sockets().keys() - spared
                halt = partial(self._halt, message.body["epoch"], self._doomed)
                threading.Thread(target=halt, name="halt", daemon=True).start()
        elif message.body["type"] == "adopt":
            engine = self.engine
            epoch = 0 if engine.mesh is None else engine.epoch
            self._send({"type": "adopted", "epoch": epoch, "bells": engine.bells_heard, **self.about()})

    def _cut_until_outside(self, spared: set[str]) -> None:
        for attempt in range(int(_CUT_FOR / _CUT_EVERY)):
            with self._gate:
                if not 0 < self._inside <= self._aborted:
                    return
                cut_collectives(self._service, attempt, spared)
                mesh = self._connecting
            if attempt == _END_CONNECTING and mesh is not None:
                threading.Thread(target=self._end_connecting, args=(mesh,), name="connecting", daemon=True).start()
            time.sleep(_CUT_EVERY)
        print(f"still inside a collective {_CUT_FOR:g} s after it was aborted: this engine ends", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(STUCK)

    def _halt(self, epoch: int, doomed: set[str]) -> None:
        """On a GPU: say when nothing is handed to the device any more that uses a communicator of this epoch, or when
        this one is still being made, which only an abort may end; and help XLA's abort, which follows, to its end: not
        before the device has done what it was given, for NCCL would free memory that collectives in the queue read.
        After a further loss all is said again, and the thread that knows of it rings for both."""
        while 0 < self._inside <= epoch and self._handed == self.engine.handed_over and self._connecting is None:
            time.sleep(_SOON)
        self._send({"type": "halted", "epoch": epoch})
        with suppress(jax.errors.JaxRuntimeError):
            self.engine.drain()
        until, rung = time.monotonic() + _CUT_FOR, 0
        while self._doomed is doomed and time.monotonic() < until and ring(doomed):
            rung += 1
            time.sleep(_CUT_EVERY if rung < _RING_OFTEN else _RING_SELDOM)

    def _end_connecting(self, mesh: ExpertMesh) -> None:
        while self._connecting is mesh and not end_connecting(self._client, mesh.devices):
            time.sleep(_CUT_EVERY)

    @contextmanager
    def _connect(self, mesh: ExpertMesh) -> Any:
        """Around the first step in a mesh, which opens sockets."""
        done = threading.Event()

        def shield() -> None:
            while not done.wait(_SHIELD_EVERY):
                shield_collectives(self._service)
            shield_collectives(self._service)

        self._connecting = mesh
        threading.Thread(target=shield, name="shield", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            self._connecting = None

    @contextmanager
    def _collective(self, epoch: int, agreed: ExpertMesh | None = None) -> Any:
        """Around what waits for other ranks. Not begun when the epoch is over; unless all ranks of a mesh have agreed
        to it, and all of them live on."""
        with self._gate:
            if epoch <= self._aborted and not (agreed and self._survivors.issuperset(_nodes(agreed))):
                raise Aborted(f"epoch {epoch} is over")
            self._inside, self._handed = epoch, self.engine.handed_over
        try:
            yield
        finally:
            with self._gate:
                self._inside = 0

    def enter(self) -> None:
        """Enter the epoch that was announced. Its first step is the agreement that all ranks are in it."""
        body = self._epoch
        assert body is not None
        self._epoch, engine, number = None, self.engine, body["number"]
        self._tell()
        self._note_sockets(self._active)
        if self.rank not in body["order"]:
            return engine.leave()  # drained: the others go on, and this process will be ended
        begun, counted = time.monotonic(), compilations.own
        ms = {"fail": 1e3 * (begun - self._cut) if self._cut else 0.0}
        self._cut = 0.0
        nodes: list[int] = body["nodes"]
        mesh = self._active = _mesh(nodes)
        slots = np.array(body["slots"], np.int32)[:, body["order"]]
        faulthandler.dump_traceback_later(_SLOW, file=sys.__stderr__ or sys.stderr)
        try:
            is_new = engine.mesh is None or engine.mesh.devices != mesh.devices
            if is_new:
                self._unready.clear()
                self._planned = False
                engine.leave()
                self._say({"type": "arrived", "epoch": number})
                with self._collective(number):
                    self._barrier(number, nodes, mesh)
            ms["agree"] = 1e3 * (time.monotonic() - begun)
            moved = engine.enter(number, mesh, slots, self._fetched, body["prefill"])
            self._fetched = {}
            ms["load"], ms["rebuild"] = 1e3 * moved, 1e3 * (time.monotonic() - begun) - ms["agree"] - 1e3 * moved
            before = time.monotonic()
            with self._connect(mesh) if is_new else nullcontext():
                self.step()
        except Aborted:
            engine.leave()
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
        if engine.epoch == number and engine.mesh is not None:
            # After a loss nobody shall wait again; and nothing is made ready twice where only places of experts change.
            if engine.programs.connects_ahead and not body["shrink"] and not self._planned:
                meshes = [_mesh(nodes) for _, nodes in body.get("ahead", ())[:_CONNECTED]]
                steps = [bucket for bucket in engine.buckets if not bucket.score]
                self._able.clear()
                self._unready = deque((mesh, bucket) for bucket in (None, *steps) for mesh in meshes)
                self._planned = True
            ms["first_step"] = 1e3 * (time.monotonic() - before)
            compiled, total = compilations.own - counted, compilations.count
            self._say({"type": "entered", "epoch": number, "ms": ms, "compilations": compiled, "compiled": total})
            threading.Thread(target=self._prepare, args=(body,), name=f"prepare-{number}", daemon=True).start()

    def _prepare(self, body: dict[str, Any]) -> None:
        """Make the meshes ready that this epoch's losses would leave, in the background, until it is over.

        At no lower priority: on a busy machine such a thread would keep the interpreter's lock while it waits its turn.
        """
        engine = self.engine
        ahead = [(_mesh(nodes), order) for order, nodes in body.get("ahead", ()) if self.rank in order]
        own = engine.own.devices
        if body["shrink"]:
            time.sleep(_PREPARE_AFTER)
        if engine.epoch != body["number"] or engine.mesh is None:
            return
        engine.programs.keep_only(own, engine.mesh.devices, *(mesh.devices for mesh, _ in ahead))
        heap.trim()  # a loaded program is 5 MiB of small blocks, all over the arenas
        for mesh, order in ahead:
            if engine.epoch != body["number"] or engine.mesh is None:
                return
            engine.prepare(mesh, np.array(body["slots"], np.int32)[:, order])
        self._send({"type": "prepared", "epoch": body["number"]})

    @property
    def _may_make_ready(self) -> bool:
        """Decided by what all ranks agreed on in the last step, and by nothing else."""
        engine = self.engine
        agreed = engine.mesh is not None and (engine.level, engine.epoch_agreed) == (0, engine.epoch)
        return agreed and bool(self._unready)

    def _make_ready(self) -> None:
        """While nobody has work, make ready the meshes that a loss would leave, bit by bit: build their communicators,
        then run their programs once. After each bit comes a step that tells whether that is still so; whoever is not in
        such a mesh waits in the step."""
        self._tell()
        mesh, bucket = self._unready.popleft()
        if mesh.local and (bucket is None or mesh in self._able):
            self._note_sockets(self._active)
            if bucket is not None:
                self.engine.load_step(mesh, bucket)
            able, nodes = bucket is not None or self.engine.has_steps(mesh.size), _nodes(mesh)
            # All of the mesh do it or none: if all of them live on, nothing ends a collective that one stays away from.
            if mesh.size == 1 or self._meetings.meet(f"ready-{self.engine.epoch}-{len(self._unready)}", nodes, _MEET):
                self._together(lambda: self._do_bit(mesh, bucket, able), mesh)
            self._note_sockets(mesh)
        if self.engine.mesh is not None:
            self.step()

    def _do_bit(self, mesh: ExpertMesh, bucket: Bucket | None, able: bool) -> None:
        if bucket is not None:
            return self.engine.rehearse(mesh, bucket)
        if mesh.size > 1:
            with self._connect(mesh):
                able = self.engine.connect(mesh, able)
        if able:
            self._able.add(mesh)

    def _note_sockets(self, mesh: ExpertMesh | None) -> None:
        """Whatever sockets are new are those of this mesh's communicator."""
        if mesh is not None and self.engine.programs.connects_ahead:
            known: set[str] = set().union(*self._sockets.values())
            self._sockets.setdefault(mesh, set()).update(open_sockets().keys() - known)

    def _spared(self, survivors: set[int]) -> set[str]:
        """Sockets of communicators that are not aborted when all but these nodes are lost."""
        left = [
            sockets
            for mesh, sockets in self._sockets.copy().items()  # the main thread may be noting others
            if mesh != self._active and survivors.issuperset(_nodes(mesh))
        ]
        return set().union(*left)

    def _barrier(self, number: int, nodes: list[int], mesh: ExpertMesh) -> None:
        """Meet the other ranks at the JAX service. In a thread, for a rank may be lost on its way there; then the
        thread is left behind until it times out, and harms nobody."""
        result: list[Any] = []

        def meet() -> None:
            try:
                forget_communicator(self._client, mesh.devices)
                result.append(self._meetings.live_nodes(f"epoch-{number}", nodes, _BARRIER))
            except Exception as e:
                result.append(e)

        thread = threading.Thread(target=meet, name=f"barrier-{number}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_TICK if self._aborted >= number else 10 * _TICK)
            if self._aborted >= number:
                raise Aborted(f"epoch {number} is over")
        if result[0] != sorted(nodes):
            self._failed(number, f"barrier: found {result[0]}, expected nodes {sorted(nodes)}")
            raise Aborted(f"epoch {number} has lost a rank")

    def _failed(self, number: int, why: str) -> None:
        """Say that an epoch's collectives fail, though nobody has said that they should."""
        if self._aborted < number:
            self._say({"type": "failed", "epoch": number, "message": why[:1000]})

    def _prefetch(self, body: dict[str, Any]) -> None:
        """Read the experts that these slots would need, for the epoch that will ask for them."""
        slots = np.array(body["slots"], np.int32)[:, None]
        self._fetched = self.engine.fetch(slots)
        self._send({"type": "prefetched"})

    # Steps

    def step(self) -> None:
        """One step. When it fails the epoch is over, and the step did not happen. Its tokens are sent, as one message,
        while the devices are at the next step, so that it takes none of their time; or by `advance` if none follows."""
        engine = self.engine

        def take() -> None:
            if engine.level != self._level:  # another program: it may have to be loaded, or its code on a GPU
                self._level = engine.level
                self._tell()
            engine.begin(ahead=True)
            self._tell()
            events = engine.finish()
            said = {"epoch": engine.epoch, "steps": engine.steps, "usage": engine.cache_usage}
            self._done = said, events

        if not self._together(take):
            return
        now = time.monotonic()
        if now - self._shielded >= HEARTBEAT:  # Gloo makes less room again when it has sent something greater
            self._shielded = now
            shield_collectives(self._service)
        for number, job in list(self._scores.items()):
            self._send_scores(number, job)
        self._send_loads()

    def _tell(self) -> None:
        """Send the last step's tokens, if that has not been done; seldom, that there were none."""
        if self._done is None:
            return
        (said, events), self._done, now = self._done, None, time.monotonic()
        if events or now - self._said >= HEARTBEAT:
            self._said = now
            self._send({"type": "events", **said, "events": [pack_event(e) for e in events]})

    def _say(self, body: dict[str, Any], data: bytes = b"") -> None:
        """In the main thread, send something that does not overtake tokens."""
        self._tell()
        self._send(body, data)

    def _send_loads(self) -> None:
        """What was asked for."""
        loads = self.engine.loads()
        if loads is not None:
            self._say({"type": "loads", "shape": loads.shape}, loads.tobytes())

    def _together(self, collective: Callable[[], None], agreed: ExpertMesh | None = None) -> bool:
        """Something that waits for the other ranks. False: it failed, and with it the epoch."""
        engine = self.engine
        try:
            with self._collective(engine.epoch, agreed):
                collective()
        except Aborted:
            engine.leave()
            return False
        except jax.errors.JaxRuntimeError as e:
            if device_is_lost(e):
                print(f"this engine ends, for its device does nothing more: {e}", file=sys.stderr, flush=True)
                os._exit(STUCK)
            engine.leave()
            self._failed(engine.epoch, str(e))
            return False
        return True

    def status(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "compilations": compilations.count,
            "epoch": engine.epoch,
            "steps": engine.steps,
            "level": engine.level,
            "bells_heard": engine.bells_heard,
            "bells_answered": engine.bells_answered,
            "parked": engine.parked,
        }

    def _drop_requests(self) -> None:
        """Whoever asked for them is no more. What they have computed stays in the cache, for those who ask again."""
        for request_id in self.engine.request_ids:
            self.engine.cancel(request_id)
        for number in list(self._scores):
            self._cancel_score(number)

    # Scores

    def _cancel_score(self, number: int) -> None:
        job = self._scores.pop(number, None)
        if job is not None:
            self.engine.cancel_score(job)

    def _send_scores(self, number: int, job: ScoreJob) -> None:
        """Send the rows that are done, in messages of bounded size, and forget them."""
        for rows in job.rows:
            at_once = max(1, SCORE_BYTES // (4 * rows.shape[1]))
            for i in range(0, len(rows), at_once):
                part = np.ascontiguousarray(rows[i : i + at_once], np.float32)
                self._say({"type": "score", "number": number, "shape": part.shape}, part.tobytes())
        job.rows.clear()
        if not job.sequence.remaining:
            del self._scores[number]
            self._say({"type": "score", "number": number, "done": True})


def _nodes(mesh: ExpertMesh) -> list[int]:
    return [device.process_index for device in mesh.devices]


def _mesh(nodes: Sequence[int]) -> ExpertMesh:
    """The devices of these nodes of the JAX service, in this order."""
    by_node = {device.process_index: device for device in jax.devices()}
    return ExpertMesh(tuple(by_node[node] for node in nodes))
