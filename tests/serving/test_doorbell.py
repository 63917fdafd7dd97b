"""Parking, waking and changing epochs, without processes: `n` ranks that follow Engine's rules and obey EngineLoop.

What stands in for the device is only the agreement: when all ranks are inside a step they leave it with the greatest
level wished and the fewest bells and the oldest epoch heard of. When messages arrive, and who moves next, is drawn at
random.
"""

import queue
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.engine import Engine
from moe_jax.request import Request, SamplingParams
from serving.channel import Message
from serving.engine_loop import Aborted, EngineLoop
from serving.messages import pack_request

PREFILL, DECODE = 2, 1


class FakeEngine:
    """Engine's state and its rule for parking; requests take one step of level PREFILL, then steps of level DECODE."""

    parked = Engine.parked
    mesh = SimpleNamespace(is_local=False)

    def __init__(self):
        self.level = self.bells_heard = self.bells_answered = self.steps = 0
        self.epoch, self.epoch_heard, self.epoch_agreed = 1, 1, 1
        self.left = {}  # request id -> steps left
        self.prefilled = set()
        self.served = set()
        self.passed = None  # (wish, bells, epoch) while inside a step

    def add(self, rank, request, accepted):
        assert rank == 0 and accepted
        self.left[request.request_id] = request.params.max_tokens

    def cancel(self, request_id):
        self.left.pop(request_id, None)
        return True

    def need(self, request_id):
        return DECODE if request_id in self.prefilled else PREFILL

    def enter(self):
        level = self.level or DECODE
        self.placed = [r for r in self.left if self.need(r) <= level]
        after = [r for r in self.left if r not in self.placed or self.left[r] > 1]
        wishes = [DECODE if r in self.placed else self.need(r) for r in after]
        self.passed = (max(wishes, default=0), self.bells_heard, self.epoch_heard)

    def leave(self, level, bells, epoch):
        self.level, self.bells_answered, self.epoch_agreed, self.passed = level, bells, epoch, None
        self.steps += 1
        for r in self.placed:
            self.prefilled.add(r)
            self.left[r] -= 1
            if self.left[r] == 0:
                del self.left[r]
                self.served.add(r)


class World:
    def __init__(self, n: int, rng: random.Random, answered: Any = min) -> None:
        self.rng, self.answered = rng, answered
        engines: list[Any] = [FakeEngine() for _ in range(n)]
        self.loops: list[Any] = [EngineLoop(engine, None, "", r, lambda *_: None) for r, engine in enumerate(engines)]
        self.wires = [[] for _ in range(n)]  # sent, not yet arrived
        self.inboxes = [[] for _ in range(n)]
        self.bell, self.number, self.cancelled, self.epoch = 0, 0, set(), 1

    def submit(self, steps):
        rank = self.rng.randrange(len(self.loops))
        self.number += 1
        request = pack_request(self.number, Request("r", (1,), SamplingParams(max_tokens=steps)))
        self.wires[rank].append({"type": "add", "request": request})
        self.bell += 1
        for wire in self.wires:
            wire.append({"type": "bell", "bell": self.bell})
        if self.rng.random() < 0.2:
            self.cancelled.add(str(self.number))
            self.wires[rank].append({"type": "cancel", "number": self.number})

    def announce(self):
        """A new epoch, that none has been lost for."""
        self.bell += 1
        self.epoch += 1
        for wire in self.wires:
            wire.append({"type": "epoch", "number": self.epoch, "shrink": False, "bell": self.bell})

    def moves(self):
        out = [("arrive", r) for r, wire in enumerate(self.wires) if wire]
        for r, loop in enumerate(self.loops):
            engine = loop.engine
            if engine.passed is None and (self.inboxes[r] or not self.loops[r].idle):
                out.append(("turn", r))
        if all(loop.engine.passed is not None for loop in self.loops):
            out.append(("step", 0))
        return out

    def move(self):
        moves = self.moves()
        if not moves:
            return False
        kind, r = self.rng.choice(moves)
        if kind == "arrive":
            self.inboxes[r].append(self.wires[r].pop(0))
        elif kind == "turn":  # one round of EngineLoop.run; the step stays open until all are in it
            loop = self.loops[r]
            messages, self.inboxes[r] = self.inboxes[r], []
            for body in messages:
                loop.handle(Message(body))
            engine = loop.engine
            if loop._may_enter:  # as Engine.enter
                engine.epoch, loop._epoch = loop._epoch["number"], None
                engine.level, engine.epoch_agreed = 0, -1
                engine.enter()
            elif not engine.parked:
                engine.enter()
        else:
            engines = [loop.engine for loop in self.loops]
            assert len({e.epoch for e in engines}) == 1, "a step of ranks that are in different epochs"
            level, bells, epochs = zip(*(e.passed for e in engines), strict=True)
            for e in engines:
                e.leave(max(level), self.answered(bells), self.answered(epochs))
        return True

    def run(self, submissions):
        """Submit everything at random moments, and go on until nothing moves: AssertionError if that is no rest.

        A submission of 0 steps is an epoch.
        """
        waiting = list(submissions)
        for _ in range(100_000):
            if waiting and (self.rng.random() < 0.15 or not self.moves()):
                steps = waiting.pop()
                if steps:
                    self.submit(steps)
                elif all(loop.engine.epoch == self.epoch for loop in self.loops):  # one at a time
                    self.announce()
                else:
                    waiting.insert(0, 0)
            elif not self.move() and not waiting:
                break
        else:
            raise AssertionError("the ranks never came to rest")
        engines = [loop.engine for loop in self.loops]
        assert all(e.passed is None for e in engines), "a rank waits in a step that the others never enter"
        assert all(e.parked and not e.left for e in engines)
        served = set().union(*(e.served for e in engines))
        assert {str(i) for i in range(1, self.number + 1)} - self.cancelled <= served
        assert len({(e.level, e.bells_answered, e.steps) for e in engines}) == 1
        assert engines[0].bells_answered == self.bell
        assert all(e.epoch == self.epoch for e in engines)


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 6), st.lists(st.integers(0, 6), max_size=12), st.randoms(use_true_random=False))
def test_every_request_is_served_and_nobody_is_left_behind(n, submissions, rng):
    World(n, rng).run(submissions)


def test_many_histories():
    for seed in range(3000):
        rng = random.Random(seed)
        World(rng.randint(2, 6), rng).run([rng.randint(0, 5) for _ in range(rng.randint(0, 10))])


def test_the_simulation_finds_a_wrong_rule():
    """Were a bell answered once any rank has heard it, a rank that hears it later would sleep through the next step."""
    with pytest.raises(AssertionError):
        for seed in range(300):
            World(4, random.Random(seed), answered=max).run([1, 1, 0, 1, 1])


def test_halted_when_the_step_is_handed_over():
    """An engine that has heard of an abort says when nothing is on its way to its device; it begins nothing more."""
    said, engine = queue.Queue(), SimpleNamespace(handed_over=0, drain=lambda: None)
    loop: Any = EngineLoop(engine, None, "", 0, said.put)  # type: ignore[arg-type]
    with loop._collective(7):
        halting = threading.Thread(target=loop._halt, args=(7, set()))
        halting.start()
        with pytest.raises(queue.Empty):
            said.get(timeout=0.05)
        engine.handed_over += 1
        assert said.get(timeout=10) == {"type": "halted", "epoch": 7}  # though it waits for the others still
    halting.join()
    loop._halt(7, set())
    assert said.get_nowait()["type"] == "halted"  # it was outside
    loop._aborted = 7
    with pytest.raises(Aborted), loop._collective(7):
        pass
