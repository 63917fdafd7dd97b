"""When an engine's tokens leave: while its devices are at the next step, and before anything that it says later."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest

from moe_jax.request import TokenEvent
from serving.channel import Message
from serving.engine_loop import EngineLoop


class Steps:
    """An engine of one epoch that has so many steps to take, a token each; `log` has what happens, in order."""

    def __init__(self, left: int) -> None:
        self.left, self.log = left, []
        self.epoch = self.epoch_agreed = self.level = 1
        self.steps, self.cache_usage = 0, 0.0
        self.bells_heard = self.bells_answered = self.handed_over = 0
        self.fails = False
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

    def has_steps(self, ranks: int) -> bool:
        return True

    def rehearse(self, mesh: "Mesh", bucket: str) -> None:
        self.log.append(f"{mesh.name} on {bucket}")

    def loads(self) -> None:
        return None


class Mesh(NamedTuple):
    name: str
    local: tuple[int, ...]  # places in it that are this process's
    size: int


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


def test_meshes_are_made_ready_bit_by_bit_while_nobody_has_work():
    """A request that comes meanwhile is heard after the next bit; what was agreed decides, not what was heard."""
    loop, engine = made(9)
    engine.level = 0
    own, theirs = Mesh("own", (0,), 1), Mesh("theirs", (), 2)
    bits: list[Any] = [(mesh, bucket) for bucket in (None, "decode", "prefill") for mesh in (own, theirs)]
    loop._unready.extend(bits)
    for _ in range(4):
        assert not loop.idle
        loop.advance()
    assert engine.log.count("begin") == 4 and [x for x in engine.log if " on " in x] == ["own on decode"]
    engine.level = 1  # as the last step agreed
    assert not loop._may_make_ready
    loop.advance()
    assert len(loop._unready) == 2
    engine.level = 0
    loop.advance()
    loop.advance()
    assert [x for x in engine.log if " on " in x] == ["own on decode", "own on prefill"] and not loop._may_make_ready
