"""The order of waiting requests, alone; and bounds and turns in the ledger."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.request import Request, SamplingParams
from moe_jax.scheduler import QueueFull
from serving.admission import FairQueue, Owner, Pace, Prefixes, block_hashes
from serving.ledger import Ledger, Place

OWNERS = [Owner("a"), Owner("b"), Owner("c", weight=3.0)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.sampled_from(OWNERS), st.integers(1, 50), st.integers(0, 2)),
            st.tuples(st.just("pop")),
            st.tuples(st.just("back")),
            st.tuples(st.just("remove"), st.integers(0, 100)),
        ),
        max_size=200,
    )
)
def test_each_once_in_order_of_class_and_arrival(steps):
    queue: FairQueue[int] = FairQueue()
    waiting: dict[int, tuple[str, int]] = {}  # item: owner, class; in the order of arrival
    popped: list[int] = []
    for number, step in enumerate(steps):
        if step[0] == "push":
            queue.push(number, step[1], step[2], step[3])
            waiting[number] = step[1].name, step[3]
        elif step[0] == "back" and popped:
            queue.push_back(item := popped.pop(), item)
            waiting[item] = "", 10
        elif step[0] == "remove" and waiting:
            item = list(waiting)[step[1] % len(waiting)]
            queue.remove(item)
            del waiting[item]
        elif step[0] == "pop":
            item = queue.pop()
            assert (item is None) == (not waiting)
            if item is not None:
                owner, level = waiting.pop(item)
                assert level == max([level, *(one for _, one in waiting.values())])
                mine = [other for other, found in waiting.items() if found == (owner, level)]
                assert all(other > item for other in mine)
                popped.append(item)
        assert len(queue) == len(waiting) and all(item in queue for item in waiting)
        for priority in range(3):
            higher = sum(level > priority for _, level in waiting.values())
            same = [owner for owner, level in waiting.values() if level == priority]
            for owner in OWNERS:
                others = len({*same} - {owner.name})
                turns = same.count(owner.name) * (1 + others) + others
                assert queue.ahead(owner, priority) == higher + min(len(same), turns)


@given(st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(1, 20)), min_size=30, max_size=120))
def test_while_all_wait_each_gets_its_share(asked):
    """Of any two owners that always have something waiting, neither is ahead by more than a request of each."""
    queue: FairQueue[int] = FairQueue()
    for number, (owner, cost) in enumerate(asked):
        queue.push(number, owner, cost)
    left, served = defaultdict(int), defaultdict(float)
    for owner, _ in asked:
        left[owner.name] += 1
    while (number := queue.pop()) is not None:
        owner, cost = asked[number]
        left[owner.name] -= 1
        served[owner.name] += cost / owner.weight
        backlogged = [o for o in OWNERS if left[o.name]]
        for one in backlogged:
            for other in backlogged:
                assert served[one.name] - served[other.name] <= 20 / one.weight + 20 / other.weight


def test_a_flood_does_not_delay_another():
    queue: FairQueue[object] = FairQueue()
    for i in range(1000):
        queue.push(i, OWNERS[0], 100)
    for _ in range(10):
        queue.pop()
    queue.push("one", OWNERS[1], 100)
    assert "one" in [queue.pop() for _ in range(2)]
    queue.push("urgent", OWNERS[0], 100, 9)
    assert queue.pop() == "urgent"
    with pytest.raises(ValueError, match="waits already"):
        queue.push(999, OWNERS[0], 1)


def test_a_long_queue_of_cancelled_ones_is_forgotten():
    queue: FairQueue[int] = FairQueue()
    for i in range(10000):
        queue.push(i, OWNERS[0], 1)
        if i >= 10:
            queue.remove(i)
    assert len(queue._heap) < 100 and [queue.pop() for _ in range(11)] == [*range(10), None]


# In the ledger


def asked(name: str, prompt: list[int] | None = None) -> Request:
    return Request(name, prompt or [1, 2, 3], SamplingParams(seed=0))


def test_ranks_get_no_more_than_they_can_use_and_turns_are_fair():
    ledger = Ledger(lambda: 0, at_once=2)
    flood = [ledger.accept(asked(f"f{i}"), OWNERS[0])[0] for i in range(20)]
    assert [job.key for job in ledger.place({0: 1, 1: 1})] == [entry.key for entry in flood[:4]]
    assert ledger.place({0: 1, 1: 1}) == [] and ledger.waiting == 16
    one, _ = ledger.accept(asked("one"), OWNERS[1])
    ledger.finish(flood[0])
    ledger.cancel(flood[1])
    assert one in ledger.place({0: 1, 1: 1}) and ledger.waiting == 15
    moved = ledger.lost(0, 1)
    assert ledger.place({1: 1}) == []  # no room there
    assert set(ledger.place({0: 2, 1: 1})) == set(moved)  # before those that have never had a place


def test_nobody_is_ahead_where_there_is_room():
    """As after a takeover, when all requests wait for their places to be known."""
    ledger = Ledger(lambda: 0, at_once=4)
    for i in range(10):
        ledger.accept(asked(f"f{i}"), OWNERS[0])
    new = OWNERS[0]
    assert [ledger.ahead(new, 0, places) for places in (1, 2, 3)] == [6, 2, 0]
    ledger.place({0: 1})
    assert [ledger.ahead(new, 0, places) for places in (1, 2, 3)] == [6, 2, 0]
    ledger.place({0: 1, 1: 1, 2: 1})
    assert ledger.waiting == ledger.ahead(new, 0, 3) == 0


def test_bounds_of_an_owner():
    ledger = Ledger(lambda: 0)
    owner = Owner("small", max_requests=2, max_tokens=10)
    first, _ = ledger.accept(asked("a"), owner)
    with pytest.raises(QueueFull, match="key 'small': found 3 tokens open and 8 more, expected at most 10: try again"):
        ledger.accept(asked("b", [1] * 8), owner)
    ledger.accept(asked("b"), owner)
    with pytest.raises(QueueFull, match="key 'small': found 2 requests open, expected fewer than 2"):
        ledger.accept(asked("c"), owner)
    assert ledger.accept(asked("c"), OWNERS[0])[1] and ledger.counts.refused == 2
    ledger.cancel(first)
    ledger.accept(asked("d"), owner)
    for name in ("b", "c", "d"):
        entry = ledger.find(name)
        assert entry is not None
        ledger.finish(entry)
    assert not ledger._owners


def test_a_prompt_goes_where_its_beginning_is_known_unless_that_is_busier():
    ledger, ranks = Ledger(lambda: 0, block=4), {0: 1, 1: 1, 2: 1}
    long = [*range(16)]
    first, _ = ledger.accept(asked("a", long))
    ledger.place(ranks)
    ledger.accept(asked("b", [7] * 8))
    ledger.place(ranks)
    again = [ledger.accept(asked(f"c{i}", [*long, i]))[0] for i in range(6)]
    ledger.place(ranks)
    assert first.place == Place(0, 1)
    assert [entry.place for entry in again[:2]] == [Place(0, 1)] * 2
    assert {entry.place for entry in again} >= {Place(0, 1), Place(2, 1)}
    ledger.lost(0, 1)
    ledger.place({1: 1})
    assert set(ledger._prefixes) == {Place(1, 1)}  # what a lost one knew is gone


def test_prefixes():
    known = Prefixes(3)
    known.note(block_hashes([1, 2, 3, 4, 5], 2))
    assert known.matched(block_hashes([1, 2, 3, 4, 9, 9], 2)) == 2
    assert known.matched(block_hashes([1, 2, 9, 4], 2)) == 1 and known.matched(block_hashes([3, 4], 2)) == 0
    known.note(block_hashes([6, 6, 6, 6], 2))
    assert known.matched(block_hashes([1, 2], 2)) == 0  # the oldest is forgotten
    assert len(block_hashes(range(10**4), 2, most=5)) == 5


def test_pace():
    """What was idle does not count, and what ends together counts once."""
    pace = Pace()
    pace.began(1000.0)
    for batch in range(1, 40):
        for _ in range(8):
            pace.ended(1000.0 + 2 * batch)
    assert pace.wait(0) == 0 and pace.wait(8) == pytest.approx(2.0)
    pace.began(9000.0)
    assert pace.wait(8) == pytest.approx(2.0)
    pace.ended(9050.0)
    assert pace.wait(128) == pytest.approx(32 - 2 + 10)  # one that takes long is not all there is


def test_a_flood_has_to_wait_and_nobody_else():
    queue: FairQueue[int] = FairQueue()
    for i in range(100):
        queue.push(i, OWNERS[0], 10)
    assert (queue.ahead(OWNERS[0]), queue.ahead(OWNERS[1]), queue.ahead(OWNERS[0], 9)) == (100, 1, 0)
