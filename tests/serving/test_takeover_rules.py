"""What is decided when a coordinator follows another one, without processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from serving import actions as act
from serving import membership as m
from serving.epoch import Epoch
from serving.takeover import ANSWER, GRACE, Takeover
from tests.serving.world import placement

T = TypeVar("T")

HOSTS = ("a", "b", "c")
plan, repair, restore = placement(3, 6, 4)
RULES = m.Rules(3, HOSTS, plan, repair, restore)


def epoch(order: tuple[int, ...] = (0, 2, 1), number: int = 7) -> Epoch:
    slots = repair(plan([0, 1, 2]), sorted(order))
    assert slots is not None
    slots.flags.writeable = False
    return Epoch(number, 3, order, tuple(10 + r for r in order), order, slots)


def taken_over(last: Epoch, entered: dict[int, int], rules: m.Rules = RULES) -> tuple[m.Membership, list[act.Action]]:
    machine = m.Membership(rules)
    machine.restore_from(last.number, 20, last.generation)
    return machine, machine.take_over(last, (0, 1, 2), {(0, 1, 2): (10, 11, 12)}, entered, 100.0)


def only(actions: list[act.Action], kind: type[T]) -> T:
    (found,) = (action for action in actions if isinstance(action, kind))
    return found


def kinds(actions: list[act.Action]) -> set[type]:
    return {type(action) for action in actions}


def test_all_are_where_they_should_be():
    machine, actions = taken_over(epoch(), dict.fromkeys(range(3), 7))
    assert only(actions, act.Serve).epoch.number == 7 and machine.state == "SERVING"
    assert kinds(actions) <= {act.Serve, act.StateChange, act.Prefetch}
    assert [rank["state"] for rank in machine.status()["ranks"]] == ["live"] * 3
    lost = machine.lost(2, 12, "its stream broke", 100.5)
    assert only(lost, act.Fence).incarnation == 12 and only(lost, act.Abort).epoch == 7
    assert machine.numbers == (7, 20, 3)
    committed = machine.fenced(2, 12, 100.51) + machine.tick(100.6)
    assert only(committed, act.Persist).epoch.number == 8


def test_one_is_missing():
    machine, actions = taken_over(epoch(), {0: 7, 2: 7})
    assert only(actions, act.Fence) == act.Fence(1, 11, 3, 1)
    assert only(actions, act.Abort) == act.Abort((0, 2), (10, 12), 7) and machine.state == "RECOVERING"
    actions = machine.fenced(1, 11, 100.01) + machine.tick(100.1)
    new = only(actions, act.Persist).epoch
    announced = only(machine.persisted(8, 100.11), act.Announce)
    assert announced.epoch is new and announced.shrink and set(new.order) == {0, 2} and new.incarnations == (10, 12)


@pytest.mark.parametrize("entered", [{0: 7, 1: 6, 2: 7}, {0: 0, 1: 0, 2: 0}])
def test_not_all_had_entered_the_last_epoch(entered):
    """Nobody knows who waits for whom, so all leave and enter the next one, in an order that was never used."""
    machine, actions = taken_over(epoch(), entered)
    assert only(actions, act.Abort) == act.Abort((0, 2, 1), (10, 12, 11), 7) and act.Fence not in kinds(actions)
    actions = [*actions, *machine.tick(100.1)]
    new = only(actions, act.Persist).epoch
    assert sorted(new.order) == [0, 1, 2] and new.order not in ((0, 1, 2), (0, 2, 1)) and new.number == 8
    assert only(machine.persisted(8, 100.11), act.Announce).shrink


def test_a_rank_outside_the_epoch_is_fenced_before_it_starts_anew():
    """It may have been joining, and the service knows an engine of it that nobody hears of any more."""
    machine, actions = taken_over(epoch((0, 2)), {0: 7, 2: 7})
    assert only(actions, act.Fence) == act.Fence(1, 0, 3, 1) and only(actions, act.Serve)
    incarnation, actions = machine.hello(1, "b", 100.1)
    assert incarnation == 21 and act.StartEngine not in kinds(actions)
    started = only(machine.fenced(1, 0, 100.2), act.StartEngine)
    assert (started.rank, started.incarnation, started.generation, started.node) == (1, 21, 3, 1)


def test_redundancy_is_restored():
    """What was fetched for that is not known any more: it is fetched again."""
    few = epoch()
    held = few.slots.copy()
    held[:, 1] = held[:, 0]
    _, actions = taken_over(replace(few, slots=held), dict.fromkeys(range(3), 7))
    assert act.Prefetch in kinds(actions)


def test_too_few_are_left():
    rules = replace(RULES, repair=lambda slots, ranks: None if len(ranks) < 3 else repair(slots, ranks))
    machine, _ = taken_over(epoch(), {0: 7, 2: 7}, rules)
    machine.fenced(1, 11, 100.01)
    machine.tick(100.1)
    assert machine.state == "UNSERVABLE"


# Who is waited for


def waiting(**given: Any) -> Takeover:
    return Takeover(epoch(), (0, 1, 2), **{"lost": set(), "begun": 50.0, **given})


def test_until_all_have_answered():
    takeover = waiting()
    assert takeover.expects(2, 12) and not takeover.expects(2, 13) and not takeover.expects(0, 12)
    for rank in range(3):
        assert not takeover.over(50.1)
        takeover.answered(rank, {"epoch": 7}, 50.1)
    assert takeover.over(50.1) and takeover.entered == {0: 7, 1: 7, 2: 7}
    takeover.gone(1)
    assert not takeover.over(50.1) and takeover.entered == {0: 7, 2: 7}


def test_those_who_were_being_fenced_or_are_new_are_not_waited_for():
    takeover = waiting(lost={12})
    assert not takeover.expects(2, 12)
    takeover.replaced(1)
    assert not takeover.expects(1, 11) and not takeover.over(50.0)
    takeover.answered(0, {"epoch": 6}, 50.0)
    assert takeover.over(50.0)


def test_nobody_is_waited_for_for_ever():
    takeover = waiting()
    assert not takeover.over(50.0 + GRACE) and takeover.over(50.1 + GRACE)
    takeover.answered(0, {"epoch": 7}, 51.0)
    assert not takeover.over(51.0 + ANSWER) and takeover.over(51.1 + ANSWER)
