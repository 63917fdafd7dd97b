"""The membership alone: in thousands of random histories, and one rung of its ladder at a time."""

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.actions import (
    Abort,
    Announce,
    Dismiss,
    Fence,
    Forget,
    Persist,
    Prefetch,
    Serve,
    StartEngine,
    StartService,
    StateChange,
    StopService,
)
from serving.membership import Membership, Rules
from tests.serving.world import Engine, Process, World, history, placement

HISTORIES = int(os.environ.get("MEMBERSHIP_HISTORIES", "2000"))
FIRST = int(os.environ.get("MEMBERSHIP_FIRST", "0"))


@pytest.mark.timeout(120 + HISTORIES // 10)
def test_random_histories():
    """All of it: MEMBERSHIP_HISTORIES=100000 python -m pytest tests/serving/test_membership.py -k histories -s

    MEMBERSHIP_FIRST=n MEMBERSHIP_HISTORIES=1 repeats the one that failed.
    """
    tally = Counter()
    for seed in range(FIRST, FIRST + HISTORIES):
        try:
            history(seed, tally)
        except Exception as e:
            raise AssertionError(f"history {seed}: {e!r}") from e
    print(f"\n{dict(sorted(tally.items()))}")


@pytest.mark.parametrize("slow", [False, True])
def test_a_barrier_and_two_engines_of_a_node(slow):
    """In the world. One has been shut out, and cannot hear of it: while it enters, or before it had connected."""
    world = World(0, Counter())
    world.faulty = False
    assert world.rules.num_ranks > 1 and world.run(20.0, world.settled)
    epoch = world.announced[-1]
    engines = [world.engines[i] for i in epoch.incarnations]
    last, *_, other = engines
    for engine in engines:
        engine.state = "entering"
        world.arrived[epoch.number].add(engine.incarnation)
    world.arrived[epoch.number].remove(last.incarnation)
    came = world.services[epoch.generation].came
    if slow:
        world.out.add(-1)
        world.connect(Engine(Process(other.rank), -1, other.generation, other.node))
    else:
        last.stuck = True
        for engine in engines[1:]:
            engine.process.held_until = world.now + 10.0
        world.launch(other.rank, twice=True)
        world.run(world.now + 1.0, lambda: came[other.node] not in (None, other))
    assert came[other.node] is not other and world.healthy(epoch, "entering")
    world.arrive(last, epoch)
    world.run(world.now + 0.1)
    assert {engine.state for engine in engines} == {"entering"}


# One rung at a time


def rules_of(ranks=3, experts=3, size=2, per_host=1, **changes):
    hosts = tuple(f"host{r // per_host}" for r in range(ranks))
    return Rules(ranks, hosts, *placement(ranks, experts, size), **changes)


class Play:
    """A Membership, a clock, and everything it has asked for."""

    def __init__(self, rules=None, serving=True, **changes):
        self.rules = rules or rules_of(**changes)
        self.machine, self.now = Membership(self.rules), 100.0
        self.done: list[Any] = []
        if serving:
            for rank in range(self.rules.num_ranks):
                self.hello(rank)
            self.load(*range(self.rules.num_ranks))
            self.enter()
            self.finish_restoring()
            self.done.clear()

    @property
    def epoch(self):
        assert self.machine.epoch is not None
        return self.machine.epoch

    def tell(self, name, *args) -> list[Any]:
        actions = getattr(self.machine, name)(*args, self.now)
        self.done += actions
        return actions

    def hello(self, rank) -> list[Any]:
        _, actions = self.machine.hello(rank, self.rules.hosts[rank], self.now)
        self.done += actions
        return actions

    def incarnation(self, rank):
        return self.machine._workers[rank].incarnation

    def of(self, rank, name, *args) -> list[Any]:
        """An event of the rank's engine."""
        return self.tell(name, rank, self.incarnation(rank), *args)

    def beat(self, rank, stopped=False) -> list[Any]:
        actions = self.machine.heartbeat(rank, self.incarnation(rank), self.now, True, stopped)
        self.done += actions
        return actions

    def kill(self, *ranks, fenced=True):
        for rank in ranks:
            for action in self.of(rank, "lost", "killed"):
                if fenced and isinstance(action, Fence):
                    self.tell("fenced", action.rank, action.incarnation)

    def wait(self, seconds, beat=True):
        """Time passes in ticks; everybody's heart beats, and nobody has work."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.1)
            for rank in list(self.machine._workers) if beat else ():
                self.beat(rank)
            self.tell("tick")

    def load(self, *ranks):
        """The service starts if it has to, and the ranks load."""
        generation = self.machine.generation
        self.tell("service_up", generation)
        for name in ("joined", "ready"):
            for rank in ranks:
                self.of(rank, name, generation)

    def enter(self):
        """The disk and the members answer; what is served then."""
        self.tell("persisted", self.machine._number)
        epoch = self.epoch
        for rank in epoch.order:
            self.of(rank, "entered", epoch.number)
        assert self.seen(Serve)[-1].epoch is epoch
        return epoch

    def finish_restoring(self):
        while self.machine._target is not None:
            for rank in list(self.machine._fetching):
                self.of(rank, "prefetched")
            self.enter()

    def seen(self, kind) -> list[Any]:
        return [action for action in self.done if isinstance(action, kind)]

    def take(self) -> list[Any]:
        done, self.done = self.done, []
        return done


def kinds(actions):
    return [type(action) for action in actions]


def test_start_waits_for_all_then_serves():
    play = Play(serving=False)
    assert play.hello(2) == [] and play.hello(0) == []
    play.wait(29)
    assert play.done == []
    start, state = play.hello(1)
    assert start == StartService(1, (0, 1, 2)) and state.name == "STARTING"
    engines = play.tell("service_up", 1)
    assert [(e.rank, e.incarnation, e.node) for e in engines] == [(0, 2, 0), (1, 3, 1), (2, 1, 2)]
    base = play.rules.plan((0, 1, 2))
    assert base is not None and all((e.slots == base[:, e.rank]).all() for e in engines)
    play.take()
    for name in ("joined", "ready"):
        for rank in range(3):
            play.of(rank, name, 1)
    state, persist = play.take()
    assert persist.epoch.number == 1 and persist.epoch.order == (0, 1, 2) and (persist.epoch.slots == base).all()
    (announce,) = play.tell("persisted", 1)
    assert announce.epoch is persist.epoch and not announce.shrink and announce.leavers == ()
    assert play.of(0, "entered", 1) == play.of(1, "entered", 1) == []
    assert kinds(play.of(2, "entered", 1)) == [Serve, StateChange] and play.machine.state == "SERVING"


def test_start_without_a_rank_and_its_growth_later():
    play = Play(serving=False)
    play.hello(0)
    play.hello(2)
    play.wait(30.5)
    assert play.done[0] == StartService(1, (0, 2))
    play.load(0, 2)
    play.enter()
    play.take()
    assert play.hello(1) == []  # the others go on while more like it may come
    play.wait(4)
    assert play.seen(StartService) == []
    play.wait(2)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))] and not play.seen(StopService)
    play.tell("service_up", 2)
    for rank in range(3):
        assert not play.seen(StopService)  # its end would take the old engines along
        play.of(rank, "joined", 2)
    assert play.seen(StopService) == [StopService(1)]
    assert len({e.incarnation for e in play.seen(StartEngine)}) == 3
    play.load(0, 1, 2)
    assert play.enter().order == (0, 1, 2)


def test_too_few_at_the_start():
    play = Play(serving=False, experts=5)
    play.hello(0)
    play.wait(31)
    assert play.machine.state == "UNSERVABLE" and "ranks [0] have too few slots" in play.machine.reason
    play.hello(1)
    play.hello(2)
    play.wait(1)  # all are here
    assert play.seen(StartService) == [StartService(1, (0, 1, 2))]
    play = Play(serving=False, experts=4)
    play.wait(31)
    play.hello(0)
    play.hello(1)
    play.wait(4)
    assert not play.seen(StartService)  # another may come a little later
    play.wait(2)
    assert play.seen(StartService) == [StartService(1, (0, 1))]


def test_loss_is_fenced_at_once_committed_after_the_window_and_announced_after_both():
    play = Play()
    now, old = play.now, play.epoch
    fence, dismiss, abort, state = play.of(1, "lost", "the stream broke")
    assert fence == Fence(1, 2, 1, 1) and dismiss == Dismiss(1, 2, "the stream broke")
    assert abort == Abort((0, 2), (1, 3), old.number)
    assert (state.name, state.reason) == ("RECOVERING", "rank 1: the stream broke")
    play.now += 0.019
    assert play.tell("tick") == [] and play.machine.due == pytest.approx(now + 0.02)
    play.now += 0.002
    persist = play.tell("tick")[-1]
    assert persist.epoch.number == old.number + 1 and persist.epoch.order == (0, 2)
    assert (persist.epoch.slots[:, 1] == -1).all()
    play.now += 0.001
    assert play.tell("persisted", persist.epoch.number) == []
    play.now += 0.001
    assert play.tell("fenced", 1, 1) == []
    (announce,) = play.tell("fenced", 1, 2)
    assert announce.shrink and announce.epoch is persist.epoch
    for rank in (0, 2):
        play.of(rank, "entered", announce.epoch.number)
    recovery = play.machine.recoveries[-1]
    assert (recovery.cause, recovery.lost, recovery.epoch) == ("loss", [1], announce.epoch.number)
    times = (recovery.began, recovery.committed, recovery.fenced, recovery.announced, recovery.served)
    assert times == pytest.approx((now, now + 0.021, now + 0.023, now + 0.023, now + 0.023))
    assert set(recovery.entered) == {0, 2}
    states = [rank["state"] for rank in play.machine.status()["ranks"]]
    assert states == ["live", "lost", "live"]


def test_losses_within_the_window_are_one_epoch_and_later_ones_the_next():
    play = Play(ranks=5, size=3)
    number = play.epoch.number
    play.kill(1)
    play.now += 0.01
    play.kill(3)
    assert [abort.ranks for abort in play.seen(Abort)] == [(0, 2, 3, 4), (0, 2, 4)]
    play.now += 0.011
    play.tell("tick")
    assert play.seen(Persist)[-1].epoch.order == (0, 2, 4)
    play.kill(0)  # committed, not yet announced: never announced
    assert play.seen(Abort)[-1] == Abort((2, 4), (3, 5), number)
    play.tell("persisted", number + 1)
    assert not play.seen(Announce)
    play.wait(0.1)
    play.tell("persisted", number + 2)
    assert play.epoch.order == (2, 4)
    play.of(2, "entered", number + 2)
    play.kill(4)  # while it is entered
    assert play.seen(Abort)[-1].epoch == number + 2
    play.wait(0.1)
    play.tell("persisted", number + 3)
    assert play.of(2, "entered", number + 2) == []  # late
    assert play.enter().number == number + 3 and play.epoch.order == (2,)


def test_first_epoch_goes_without_those_not_ready():
    play = Play(serving=False, ready_timeout_s=6.0)
    for rank in range(3):
        play.hello(rank)
    play.load(0, 2)
    play.of(1, "joined", 1)
    play.wait(5.9)
    assert not play.seen(Persist)
    play.wait(0.2)
    (fence,) = play.seen(Fence)
    assert fence.rank == 1 and [d.rank for d in play.seen(Dismiss)] == [1]
    play.tell("fenced", 1, fence.incarnation)
    assert play.enter().order == (0, 2)


def test_loss_before_all_have_joined_starts_over():
    play = Play(serving=False)
    for rank in range(3):
        play.hello(rank)
    play.tell("service_up", 1)
    play.of(0, "joined", 1)
    play.take()
    assert kinds(play.of(1, "lost", "killed")) == [Dismiss, StateChange]  # a fence would wait with the others
    play.wait(2)
    play.hello(1)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))]
    play.kill(1)
    play.wait(4.5)
    assert len(play.seen(StartService)) == 1
    play.wait(1)
    assert play.seen(StartService)[-1] == StartService(3, (0, 2)) and StopService(2) in play.done


def test_join_deadline_blames_whom_the_others_wait_for():
    play = Play(serving=False)
    for rank in range(3):
        play.hello(rank)
    play.tell("service_up", 1)
    for rank in (0, 2):
        play.of(rank, "arrived", 0)
    play.wait(61)
    assert [d.rank for d in play.seen(Dismiss)] == [1]
    play = Play(serving=False)
    for rank in range(3):
        play.hello(rank)
    play.tell("service_up", 1)
    play.wait(61)
    assert not play.seen(Dismiss) and play.seen(StartService)[-1] == StartService(2, (0, 1, 2))


def test_enter_deadline_blames_whom_the_others_wait_for():
    play = Play(ranks=4)
    play.kill(3)
    play.wait(0.1)
    play.tell("persisted", play.machine._number)
    for rank in (0, 2):
        play.of(rank, "arrived", play.epoch.number)
    play.wait(10.1)
    assert [d.rank for d in play.seen(Dismiss)] == [3, 1]
    play.wait(0.1)
    assert not play.seen(Announce)[1:]
    play.tell("fenced", 1, 2)
    play.tell("persisted", play.machine._number)
    assert play.epoch.order == (0, 2)
    play.wait(10.1)  # nobody says anything: nobody is to blame
    assert len(play.seen(Dismiss)) == 2 and play.seen(StartService) == [StartService(2, (0, 2))]


def test_failed_collective_waits_for_the_culprit():
    play = Play()
    number = play.epoch.number
    abort, _ = play.of(0, "failed", number)
    assert abort.ranks == (0, 1, 2)
    play.wait(0.5)
    play.kill(2)
    assert [abort.ranks for abort in play.seen(Abort)] == [(0, 1, 2), (0, 1)]
    play.wait(0.1)
    assert play.enter().order == (0, 1)


def test_failed_collective_without_a_culprit():
    play = Play()
    play.of(0, "failed", play.epoch.number)
    play.wait(1)
    assert not play.seen(Persist)
    play.wait(0.2)
    assert play.enter().order == (0, 2, 1)
    play.of(1, "failed", play.epoch.number)
    play.wait(1.2)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))]


def test_failed_collective_while_a_join_is_announced():
    play = Play(size=3)
    before = play.epoch.number
    play.kill(2)
    play.wait(0.1)
    play.enter()
    play.finish_restoring()
    serving = play.epoch.number
    play.hello(2)
    play.load(2)
    play.tell("persisted", play.machine._number)
    assert play.of(0, "failed", before) == []  # that one is over
    assert kinds(play.of(0, "failed", serving)) == [Abort, StateChange]  # this one is not, until all have entered


def test_rejoin():
    play = Play()
    play.kill(0, fenced=False)
    play.wait(0.1)
    assert play.hello(0) == []  # the fence is still to come, and would hit the new engine
    play.tell("persisted", play.machine._number)
    announce, forget, start = play.tell("fenced", 0, 1)
    assert kinds([announce, forget, start]) == [Announce, Forget, StartEngine]
    assert forget == Forget(1) and (start.rank, start.node, start.generation) == (0, 0, 1)
    assert play.enter().order == (1, 2)
    play.take()
    play.of(0, "joined", 1)
    (persist,) = play.of(0, "ready", 1)
    assert persist.epoch.order == (1, 2, 0) and persist.epoch.incarnations == (2, 3, 4)
    (announce,) = play.tell("persisted", persist.epoch.number)
    assert not announce.shrink and play.machine.state == "SERVING"
    base = play.rules.plan((0, 1, 2))
    assert base is not None and (announce.epoch.slots[:, 0] == base[:, 0]).all()
    assert play.enter().order == (1, 2, 0) and not play.seen(Abort)
    assert play.machine.recoveries[-1].joined == [0]


def test_joiner_lost_before_it_is_announced_disturbs_nobody():
    play = Play()
    play.kill(2)
    play.wait(0.1)
    epoch = play.enter()
    play.finish_restoring()
    play.hello(2)
    play.load(2)
    play.take()
    play.kill(2)  # its epoch is on the way to the disk
    play.tell("persisted", play.machine._number)
    assert kinds(play.take()) == [Fence, Dismiss] and play.epoch.order == epoch.order
    play.hello(2)
    play.load(2)
    play.tell("persisted", play.machine._number)
    play.take()
    play.kill(2)  # now it is known: some may be in that epoch
    assert kinds(play.take())[:3] == [Fence, Dismiss, Abort]
    play.wait(0.1)
    assert play.enter().order == (1, 0)


def test_joiner_lost_before_it_is_announced_while_redundancy_is_restored():
    play = Play(ranks=4)
    play.kill(1)
    play.wait(0.1)
    order = play.enter().order
    prefetches = play.seen(Prefetch)
    play.hello(1)
    play.load(1)
    joined = play.seen(Persist)[-1].epoch
    assert prefetches and 1 in joined.order
    play.take()
    play.kill(1)
    assert len(play.seen(Prefetch)) == len(prefetches)  # again: they were put off for it
    play.finish_restoring()
    assert play.epoch.order == order and play.epoch.number > joined.number and play.machine.busy is None


def test_member_lost_while_a_join_is_committed():
    play = Play(size=3)
    play.kill(2)
    play.wait(0.1)
    play.enter()
    play.finish_restoring()
    play.hello(2)
    play.load(2)
    number = play.machine._number
    play.kill(0)
    play.tell("persisted", number)
    play.wait(0.1)
    assert play.enter().order == (1,)  # those who serve first: the joiner's communicator would take longer
    recovery = play.machine.recoveries[-1]
    assert (recovery.cause, recovery.lost, recovery.joined) == ("loss", [0], [])
    assert play.enter().order == (1, 2)
    assert (play.machine.recoveries[-1].cause, play.machine.recoveries[-1].joined) == ("join", [2])


def test_unservable_and_back():
    play = Play(experts=5)
    play.kill(1)
    play.wait(0.1)
    assert play.machine.state == "UNSERVABLE" and not play.seen(Persist)
    assert not any(d.rank != 1 for d in play.seen(Dismiss))
    play.wait(100)
    play.hello(1)
    play.load(1)
    play.tell("persisted", play.machine._number)
    (announce,) = play.seen(Announce)
    assert announce.shrink and announce.epoch.order == (0, 2, 1) and announce.epoch.generation == 1
    play.enter()
    assert play.machine.state == "SERVING"


def test_nobody_survives():
    play = Play()
    play.kill(0, 1, 2)
    assert not play.seen(StartService)
    play.wait(1)
    for rank in range(3):
        play.hello(rank)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))]


@pytest.mark.parametrize("orders", ["any", "sorted"])
def test_orders_run_out(orders):
    play = Play(ranks=3, size=3, orders=orders)
    seen = []
    for _ in range(4):
        play.take()
        play.kill(2)
        play.wait(0.1)
        if not play.seen(Persist):
            break
        seen.append(play.enter().order)
        play.hello(2)
        play.load(2)
        assert set(play.enter().order) == {0, 1, 2}
    if orders == "any":
        play.hello(2)
        assert seen == [(0, 1), (1, 0)] and play.seen(StartService) == [StartService(2, (0, 1, 2))]
    else:
        assert seen == [(0, 1)] * 4


def test_who_was_in_both_orders_of_two_is_relieved():
    play, seen = Play(ranks=2, size=3), []
    for _ in range(4):
        play.take()
        play.kill(1)
        play.wait(0.1)
        seen.append(play.enter().order)
        play.hello(1)
        play.load(1)
        seen.append(play.enter().order)
        if seen[-1] == (1,):
            announced = play.seen(Announce)[-1]
            assert announced.leavers == (0,) and not announced.shrink  # nobody's collective is aborted
            assert [(d.rank, d.reason) for d in play.seen(Dismiss)] == [(1, "killed"), (0, "drained")]
            play.tell("fenced", 0, play.seen(Fence)[-1].incarnation)
            play.hello(0)
            play.load(0)
            seen.append(play.enter().order)
    assert seen == [(0,), (1, 0), (0,), (1,), (1, 0), (0,), (0, 1), (0,), (1,), (1, 0)], seen
    assert not play.seen(StartService)


def test_who_was_to_relieve_is_lost_again():
    play = Play(ranks=2, size=3)
    for _ in range(2):
        play.kill(1)
        play.wait(0.1)
        play.enter()
        play.hello(1)
        play.load(1)
        if play.seen(Persist)[-1].epoch.order == (1, 0):
            play.enter()
    assert play.seen(Persist)[-1].epoch.order == (1,)
    play.kill(1)
    play.wait(0.1)
    assert play.epoch.order == (0,) and (play.machine.state, play.machine.reason) == ("SERVING", "")
    play.hello(1)
    play.load(1)
    assert play.enter().order == (1,) and not play.seen(StartService)


def test_an_order_is_free_again_when_nobody_is_left_who_was_in_it():
    play, seen = Play(ranks=2, size=3), []
    for rank in (1, 0, 1, 0):
        assert play.machine.worn() is None  # whoever were replaced, the other one would be left in both orders
        play.take()
        play.kill(rank)
        play.wait(0.1)
        seen.append(play.enter().order)
        play.hello(rank)
        play.load(rank)
        seen.append(play.enter().order)
    assert seen == [(0,), (1, 0), (1,), (0, 1)] * 2 and not play.seen(StartService)


def test_who_is_replaced_before_orders_run_out():
    play = Play(ranks=4, size=4)
    for rank in (3, 3, 3, 3, 3, 0, 1, 2):
        # The others without rank 3 have had 5 of 6 orders, until none of them is left.
        assert play.machine.worn() == (None if rank == 3 else rank)
        play.kill(rank)
        play.wait(0.1)
        play.enter()
        play.hello(rank)
        play.load(rank)
        play.enter()
    assert play.machine.worn() is None


def test_orders_of_the_meshes_ahead():
    play = Play(ranks=4, per_host=2, size=3)
    assert play.machine.ahead() == [(2, 3), (0, 1)]
    play.kill(0, 1)
    play.wait(0.1)
    assert play.enter().order == (2, 3) and play.machine.ahead() == []


def test_service_lost():
    play = Play()
    assert kinds(play.tell("service_lost", 1)) == [StopService, StateChange]
    play.wait(0.2)
    assert not play.seen(StartService)  # engines that die with it have this time to be missed
    play.wait(0.2)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))]
    assert play.tell("service_lost", 1) == play.tell("service_up", 1) == []
    play.wait(31)  # it does not come up
    assert StopService(2) in play.done and play.seen(StartService)[-1] == StartService(3, (0, 1, 2))
    engines = play.tell("service_up", 3)
    assert [e.incarnation for e in engines] == [4, 5, 6]
    for rank in range(3):  # the engines before
        play.tell("ready", rank, rank + 1, 3)
        play.of(rank, "ready", 2)
    assert not play.seen(Persist)
    play.load(0, 1, 2)
    assert play.enter().incarnations == (4, 5, 6)


def test_a_service_that_does_not_fence_is_lost():
    play = Play()
    play.kill(1, fenced=False)
    play.wait(0.1)
    play.tell("persisted", play.machine._number)
    play.wait(2.8)
    assert not play.seen(Announce)
    play.wait(0.2)
    assert StopService(1) in play.done and play.machine.state == "RECOVERING"


def test_persist_is_repeated():
    play = Play()
    play.kill(1)
    play.wait(10.2)
    first, second = play.seen(Persist)
    assert first.epoch is second.epoch


def test_redundancy_is_restored_in_the_background():
    play = Play(ranks=4, prefetch_timeout_s=6.0)
    play.kill(1)
    play.wait(0.1)
    epoch = play.enter()
    prefetches = play.seen(Prefetch)
    assert prefetches and play.machine.state == "SERVING"
    play.wait(6.1)
    assert len(play.seen(Prefetch)) == 2 * len(prefetches)
    play.take()
    for prefetch in prefetches:
        play.of(prefetch.rank, "prefetched")
    restored = play.enter()
    assert restored.order == epoch.order and play.seen(Announce)[-1].shrink is False
    assert (restored.slots == play.rules.restore(epoch.slots, (0, 2, 3))).all() and not play.seen(Prefetch)


def test_redundancy_is_restored_once():
    rules = rules_of()
    play = Play(replace(rules, restore=lambda slots, ranks: np.where(slots < 0, slots, (slots + 1) % 3)))
    assert [r.cause for r in play.machine.recoveries] == ["start", "restore"]
    play.wait(1)
    assert play.done == []


def test_drain():
    play = Play(ranks=4, per_host=2, experts=4)
    refused, actions = play.machine.drain("host7", play.now)
    assert "host0, host1" in str(refused) and actions == []
    refused, actions = play.machine.drain("host1", play.now)
    assert refused is None and play.machine.state == "DRAINING"
    play.done += actions
    play.tell("persisted", play.machine._number)
    (announce,) = play.seen(Announce)
    assert announce.epoch.order == (0, 1) and announce.leavers == (2, 3) and not announce.shrink
    assert not play.seen(Dismiss) and not play.seen(Abort)
    play.enter()
    assert [d.rank for d in play.seen(Dismiss)] == [2, 3] and play.machine.state == "SERVING"
    assert "[] have too few slots" in str(play.machine.drain("host0", play.now)[0])
    for fence in play.seen(Fence):
        play.tell("fenced", fence.rank, fence.incarnation)
    play.hello(2)
    assert play.seen(StartEngine)[-1].rank == 2


def test_drain_of_what_is_needed_is_refused():
    play = Play(experts=5)
    refused, actions = play.machine.drain("host1", play.now)
    assert "[0, 2] have too few slots" in str(refused) and actions == [] and play.machine.state == "SERVING"
    play = Play()
    play.machine.drain("host1", play.now)
    play.kill(2)  # before the drain was announced: now it would be too much
    play.wait(0.1)
    assert play.enter().order == (0, 1)
    assert play.machine.state == "SERVING" and play.machine.reason.startswith("drain dropped")


def test_leaver_lost_while_it_leaves():
    play = Play(ranks=4, per_host=2, size=3)
    play.machine.drain("host1", play.now)
    play.tell("persisted", play.machine._number)
    play.take()
    play.kill(2)  # and where the other one stands is not known
    assert kinds(play.take())[:5] == [Fence, Dismiss, Fence, Dismiss, Abort]
    play.tell("fenced", 3, 4)
    play.wait(0.1)
    assert play.enter().order == (1, 0)


def test_stall_has_a_deterministic_victim():
    play = Play()
    play.wait(100)  # nobody has work
    assert play.done == []
    for steps in (5, 6):
        for rank in range(3):
            play.of(rank, "progress", steps + (rank == 0), True)
    play.wait(19.9)
    assert play.done == []
    play.wait(0.2)
    assert play.seen(Dismiss) == [Dismiss(2, 3, "no step for 20.0 s, though all ranks are well")]


def test_heartbeats():
    play = Play()
    assert kinds(play.beat(1, stopped=True))[:3] == [Fence, Dismiss, Abort]
    play = Play()
    for _ in range(9):
        play.now += 0.1
        assert play.beat(0) == play.beat(2) == play.tell("tick") == []
    play.now += 0.11
    assert play.tell("tick")[0].rank == 1
    late = Dismiss(1, 2, "this incarnation was lost")
    assert play.machine.heartbeat(1, 2, play.now, True, False) == [late]


def test_a_driver_that_stood_still_judges_nobody():
    play = Play()
    play.tell("tick")
    play.now += 60
    assert play.tell("tick") == []
    play.wait(0.9, beat=False)
    assert play.done == []
    play.wait(0.2, beat=False)
    assert len(play.seen(Dismiss)) == 3


def test_lost_host_is_all_its_ranks():
    play = Play(ranks=4, per_host=2, experts=4)
    play.done += play.machine.lost(2, play.incarnation(2), "no route", play.now, host=True)
    assert [f.rank for f in play.seen(Fence)] == [2, 3] and play.seen(Abort)[0].ranks == (0, 1)


def test_second_hello_replaces_the_worker():
    play = Play()
    assert kinds(play.hello(1))[:3] == [Fence, Dismiss, Abort]
    for late in (("lost", "late"), ("entered", 1), ("failed", 1), ("ready", 1), ("progress", 9, True), ("arrived", 1)):
        assert play.tell(late[0], 1, 2, *late[1:]) == []


def test_a_rank_that_keeps_failing_is_held_back():
    play = Play(serving=False)
    for rank in range(3):
        play.hello(rank)
    for _ in range(2):
        play.tell("service_up", play.machine.generation)
        play.kill(1)
        play.wait(1)
        play.hello(1)
        play.wait(0.1)
    play.wait(5)
    assert play.seen(StartService)[-1].nodes == (0, 2)


def test_a_rank_that_is_held_back_is_let_in_when_it_is_needed():
    play = Play()
    play.kill(2)
    play.wait(0.1)
    play.enter()
    for _ in range(2):
        assert play.hello(2)
        play.kill(2)
        play.wait(0.1)
    assert play.hello(2) == []
    play.wait(3)
    assert play.machine._workers[2].stage == "waiting"
    play.take()
    play.kill(1)
    play.wait(0.1)
    assert play.machine.state == "UNSERVABLE" and [e.rank for e in play.seen(StartEngine)] == [2]
    play.load(2)
    assert play.enter().order == (0, 2)
    play.take()
    play.tell("service_lost", 1)
    play.hello(1)
    play.wait(0.3)
    assert play.seen(StartService) == [StartService(2, (0, 1, 2))]  # it has served: all is forgotten
    play.load(0, 1, 2)
    play.enter()
    play.kill(2)
    assert kinds(play.hello(2)) == [StartEngine]


def test_hello_of_a_stranger():
    play = Play()
    for rank, host, match in ((7, "host7", "a rank from 0 to 2"), (1, "elsewhere", "host 'host1'")):
        _, (dismiss,) = play.machine.hello(rank, host, play.now)
        assert isinstance(dismiss, Dismiss) and match in dismiss.reason


def test_numbers_go_on_after_the_coordinator():
    old = Play()
    machine = Membership(old.rules)
    machine.restore_from(*old.machine.numbers)
    play = Play(old.rules, serving=False)
    play.machine = machine
    for rank in range(3):
        play.hello(rank)
    play.load(0, 1, 2)
    epoch = play.enter()
    assert (epoch.number, epoch.generation) == (old.epoch.number + 1, 2)
    assert min(epoch.incarnations) > max(old.epoch.incarnations)


@pytest.mark.parametrize(("name", "value"), [("hosts", ("a",)), ("orders", "some"), ("window_s", 0)])
def test_bad_rules_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        rules_of(**{name: value}) if name != "hosts" else Rules(2, value, *placement(2, 1, 1))
