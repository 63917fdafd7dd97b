"""When an engine's tokens leave, how it makes meshes ready, and what it does when losses come one after the other."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest

from moe_jax.request import TokenEvent
from serving import engine_loop
from serving.channel import Message
from serving.engine_loop import EngineLoop


class Steps:
    """An engine of one epoch that has so many steps to take, a token each; `log` has what happens, in order."""

    def __init__(self, left: int) -> None:
        self.left, self.log = left, []
        self.epoch = self.epoch_agreed = self.level = 1
        self.steps, self.cache_usage = 0, 0.0
        self.bells_heard = self.bells_answered = self.handed_over = 0
        self.fails = self.fails_to_rehearse = False
        self.answer = True
        self.mesh: Any = SimpleNamespace(devices=())
        self.programs = SimpleNamespace(connects_ahead=False)

    @property
    def parked(self) -> bool:
        return self.mesh is None or not self.left

    def begin(self, ahead: bool) -> None:
        self.log.append("begin")
        if self.fails:
            raise jax.errors.JaxRuntimeError("a collective failed")

    def finish(self) -> list[TokenEvent]:
        self.steps, self.left = self.steps + 1, self.left - 1
        return [TokenEvent("7", self.steps - 1, 5, 0.0)]

    def leave(self) -> None:
        self.mesh = None

    def drain(self) -> None:
        return None

    def has_steps(self, ranks: int) -> bool:
        return True

    def load_step(self, mesh: "Mesh", bucket: str) -> None:
        pass

    def connect(self, mesh: "Mesh", able: bool) -> bool:
        self.log.append(f"connect {mesh}")
        return able and self.answer

    def rehearse(self, mesh: "Mesh", bucket: str) -> None:
        self.log.append(f"{mesh} on {bucket}")
        if self.fails_to_rehearse:
            raise jax.errors.JaxRuntimeError("no memory")

    def loads(self) -> None:
        return None


class Mesh(NamedTuple):
    nodes: tuple[int, ...]  # this process is 0

    @property
    def devices(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(process_index=node) for node in self.nodes)

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(place for place, node in enumerate(self.nodes) if node == 0)

    @property
    def size(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return ",".join(map(str, self.nodes))


TWO, OTHERS, ALONE = Mesh((0, 1)), Mesh((1, 2)), Mesh((0,))


def made(left: int) -> tuple[EngineLoop, Steps]:
    engine: Any = Steps(left)

    def send(body: dict[str, Any], data: bytes = b"") -> None:
        engine.log.append(f"tokens of step {body['steps']}" if body["type"] == "events" else body["type"])

    return EngineLoop(engine, None, "", 0, send), engine


def test_while_the_devices_are_at_the_next_step():
    loop, engine = made(3)
    while not engine.parked:
        loop.advance()
    assert engine.log == ["begin", "begin", "tokens of step 1", "begin", "tokens of step 2", "tokens of step 3"]


def test_before_a_step_of_another_program():
    """It may have to be loaded first."""
    loop, engine = made(2)
    loop.advance()
    engine.level = 2
    loop.advance()
    assert engine.log == ["begin", "tokens of step 1", "begin", "tokens of step 2"]


def test_before_it_is_said_that_the_next_step_failed():
    loop, engine = made(3)
    loop.advance()
    engine.fails = True
    loop.advance()
    assert engine.log == ["begin", "begin", "tokens of step 1", "failed"]


@pytest.mark.parametrize("between", ["abort", "status"])
def test_before_anything_else(between: str):
    loop, engine = made(3)
    loop.advance()
    if between == "abort":
        loop._aborted = 1
        loop.advance()
        assert engine.log == ["begin", "tokens of step 1"] and engine.mesh is None
    else:
        loop.handle(Message({"type": "status"}, b""))
        assert engine.log == ["begin", "tokens of step 1", "status"]


def at_leisure(answer: bool = True) -> tuple[EngineLoop, Steps]:
    """In an idle mesh of nodes 0 to 2, of which this is 0, with three meshes to be made ready. answer: of `connect`."""
    loop, engine = made(10)
    engine.level, engine.answer = 0, answer
    bits: list[Any] = [(mesh, bucket) for bucket in (None, "decode", "prefill") for mesh in (TWO, OTHERS, ALONE)]
    loop._unready.extend(bits)
    return loop, engine


def bits(engine: Steps) -> list[str]:
    return [x for x in engine.log if not x.startswith(("begin", "tokens"))]


def test_meshes_are_made_ready_bit_by_bit_while_nobody_has_work(monkeypatch: pytest.MonkeyPatch):
    """What was agreed decides, and not what this rank has heard; each bit is followed by a step."""
    loop, engine = at_leisure()
    names = met(loop, monkeypatch, True)
    for done in range(1, 5):
        assert not loop.idle
        loop.advance()
        assert engine.log.count("begin") == done
    assert bits(engine) == ["connect 0,1", "0,1 on decode"]
    engine.bells_heard = 9  # another rank may not have heard it
    assert loop._may_make_ready
    engine.level = 1  # as the last step agreed
    loop.advance()
    assert len(loop._unready) == 5 and engine.log.count("begin") == 5
    engine.level = 0
    while not loop.idle:
        loop.advance()
    assert bits(engine) == ["connect 0,1", "0,1 on decode", "0 on decode", "0,1 on prefill", "0 on prefill"]
    assert engine.log.count("begin") == 10 and names == ["ready-1-8", "ready-1-5", "ready-1-2"]


@pytest.mark.parametrize("able", [False, None])
def test_programs_that_a_rank_has_not_are_not_run(able: bool | None, monkeypatch: pytest.MonkeyPatch):
    """None: not all of the mesh came; then none of it does anything."""
    loop, engine = at_leisure(bool(able))
    met(loop, monkeypatch, able is not None)
    while loop._unready:
        loop.advance()
    assert bits(engine) == [*(["connect 0,1"] if able is not None else []), "0 on decode", "0 on prefill"]
    assert engine.log.count("begin") == 9 and engine.mesh is not None


@pytest.mark.parametrize("lost, done", [(2, ["connect 0,1"]), (1, [])])
def test_what_all_of_a_mesh_agreed_to_is_done_if_all_live_on(
    lost: int, done: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The others may not have heard that the epoch is over, and nothing would end their collectives."""
    loop, engine = at_leisure()
    met(loop, monkeypatch, True)
    loop._aborted, loop._survivors = 1, {0, 1, 2} - {lost}
    loop.advance()
    assert bits(engine) == done and engine.mesh is None and not loop._may_make_ready and loop.idle


def test_a_rehearsal_that_fails_ends_the_epoch(monkeypatch: pytest.MonkeyPatch):
    loop, engine = at_leisure()
    met(loop, monkeypatch, True)
    loop.advance()
    engine.fails_to_rehearse = True
    while engine.mesh is not None:
        loop.advance()
    assert bits(engine)[-2:] == ["0,1 on decode", "failed"] and loop.idle


def met(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[str]:
    """The names under which this rank has met others."""
    names: list[str] = []
    monkeypatch.setattr(loop._meetings, "meet", lambda name, nodes, timeout: names.append(name) or answer)
    monkeypatch.setattr(loop, "_connect", lambda mesh: nullcontext())
    return names


def test_a_second_loss_before_the_next_epoch(monkeypatch: pytest.MonkeyPatch):
    """It is said again that this engine has halted, and those are rung, too, that only the second loss ends."""
    loop, engine = made(9)
    rung: list[set[str]] = []
    cuts: list[set[str]] = []

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline, (engine.log, rung, cuts)
            time.sleep(0.001)

    def abort(*survivors: int) -> None:
        loop.urgent(Message({"type": "abort", "epoch": 1, "survivors": survivors}, b""))

    def ring(doomed: set[str]) -> bool:
        rung.append(doomed)
        return len(rung) < 12

    monkeypatch.setattr(engine_loop, "ring", ring)
    monkeypatch.setattr(engine_loop, "cut_collectives", lambda service, attempt, spared: cuts.append(spared))
    monkeypatch.setattr(engine_loop, "open_sockets", lambda: dict.fromkeys(("all", "0 2 3", "0 3"), 0))
    engine.programs.connects_ahead = True
    all_of_them: Any = Mesh((0, 1, 2, 3))
    sockets: Any = {all_of_them: {"all"}, Mesh((0, 2, 3)): {"0 2 3"}, Mesh((0, 3)): {"0 3"}}
    loop._active, loop._sockets = all_of_them, sockets
    with loop._collective(1):
        abort(0, 2, 3)
        begun = loop._cut
        abort(0, 3)
        until(lambda: {"0 2 3", "0 3"} in cuts and {"0 3"} in cuts)
        assert "halted" not in engine.log and loop._cut == begun
        engine.handed_over += 1
        until(lambda: engine.log == ["halted", "halted"] and len(rung) == 12)
    assert rung[-1] == {"all", "0 2 3"}
    rung.clear()
    abort(0, 2, 3)
    until(lambda: bool(rung))
    abort(0, 3)  # when it is outside, and rings already
    until(lambda: engine.log == 4 * ["halted"] and len(rung) == 12)
    assert rung[0] == {"all"} and rung[-1] == {"all", "0 2 3"}
