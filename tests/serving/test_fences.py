"""When the service is asked, without processes."""

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fences import Fences

ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), st.sets(st.integers(0, 3), max_size=2), st.sets(st.integers(0, 3), max_size=4)),
        st.tuples(st.just("halted"), st.integers(0, 3)),
        st.tuples(st.just("late")),
    ),
    max_size=30,
)


def noting() -> tuple[Any, list[int]]:
    """A service, and the nodes that it has been asked to fence."""
    asked: list[int] = []
    return SimpleNamespace(generation=1, open=True, fence=asked.append), asked


@settings(max_examples=500)
@given(ACTS, st.booleans())
def test_each_is_asked_once_and_not_before_the_others_have_halted(acts, patient):
    service, asked = noting()

    async def play() -> None:
        fences, busy, held, added = Fences(60.0 if patient else 0.0), set(), [], []
        for act in acts:
            if act[0] == "batch":
                _, lost, aborted = act
                for node in lost:
                    fences.add(service, node, node, node)
                    busy.discard(node)
                    held.append(node)
                if aborted - lost:
                    fences.aborted(aborted - lost, 1)
                    busy |= aborted - lost if patient else set()
                fences.release()
            elif act[0] == "halted":
                fences.halted(act[1], 1)
                busy.discard(act[1])
            elif fences._timer is not None:  # the time is over
                fences._ask()
                added, held, busy = added + held, [], set()
            if not busy:
                added, held = added + held, []
            assert asked == added
        assert (fences._timer is None) == (not held)
        fences._ask()
        assert asked == added + held
        assert [fences.answered(1, node) for node in asked] == [(node, node) for node in asked]

    asyncio.run(play())


def test_survivors_are_waited_for_whoever_reports_first():
    """A collective's failure is reported, and ends the epoch, before anyone knows which rank is lost."""
    service, asked = noting()

    async def play() -> None:
        fences = Fences(60.0)
        fences.aborted([5, 6], 3)
        fences.release()
        fences.halted(5, 3)
        fences.add(service, 2, 2, 7)
        fences.release()
        fences.halted(6, 2)  # what it says of an earlier epoch comes late
        assert not asked
        fences.halted(6, 3)
        assert asked == [2]

    asyncio.run(play())


def test_a_service_that_is_no_more_is_not_asked():
    service, asked = noting()

    async def play() -> None:
        fences = Fences(60.0)
        fences.add(service, 2, 2, 7)
        fences.aborted([8], 1)
        fences.release()
        fences.forget(1)
        fences.halted(8, 1)
        assert not asked

    asyncio.run(play())
