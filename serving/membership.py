"""Who is in the mesh: evidence in, numbered epochs out.

Pure decisions: this module must not know the network, the disk, the clock, JAX, or which request is where. A driver
tells it what happened, one method an event with the time (seconds, monotonic), and carries out the actions it gets
back, in their order. It calls `tick` at least every max_tick_gap_s / 2, and at `due`.

    observe      lost, failed, a heartbeat that is missing: evidence, not yet membership
    fence        Fence and Dismiss the lost, Abort the survivors' collectives              at once
    commit       an epoch, a number used once: the survivors and what their slots hold     window_s later: Persist
    acknowledge  once it is persisted and the lost are fenced: Announce; each member says `entered`
    serve        once all have: Serve. A loss before that is the next epoch, and nothing is taken back

Joins, drains and restored redundancy are epochs too, but nobody is aborted for them: all ranks switch at one step.
Below the epochs lies the generation, one run of the JAX service with a fixed set of nodes. Its phases:

    gather → service → join → load → run      `join`: JAX lets nobody through before all have come, so a loss there
                                              starts over; from `load` on a loss is a loss, and a rank may come late

A new generation restarts every engine. It is what is left when the service died, a rank came that is not among the
nodes, no member survived, no order of ranks is left, or a deadline passed and nobody in particular is to blame.
Every wait is a timer in one table; `tick` says what follows when it ends. Two waits have none, and say UNSERVABLE:
for ranks to come when those present have too few slots, in `gather` and in `run`.

An incarnation is one run of an engine: `hello` gives a worker its first, each later StartEngine a new one. A lost
incarnation is in no later epoch, and what it still says changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, permutations
from math import factorial
from typing import Any, Literal

import numpy as np

from serving.actions import (
    Abort,
    Action,
    Announce,
    Dismiss,
    Fence,
    Forget,
    Persist,
    Prefetch,
    Serve,
    StartEngine,
    StartService,
    State,
    StateChange,
    StopService,
)
from serving.epoch import Epoch, Slots
from serving.timers import Timers

MOVES = ("restore", "rebalance")  # causes of epochs in which the same ranks hold other experts
_MOST_AHEAD = 32  # hosts


@dataclass(frozen=True)
class Rules:
    """What does not change. Times are seconds; raises ValueError for values that cannot work.

    Ranks are passed sorted. `repair` must ignore rows of other ranks, leave all as it is when no expert is missing, and
    be fast, for the survivors wait for it: it is given the array of the epoch that was served, so tables can be ready.
    """

    num_ranks: int
    hosts: tuple[str, ...]  # of each rank
    plan: Callable[[Sequence[int]], Slots | None]  # ranks → slots; None: too few slots for all experts
    repair: Callable[[Slots, Sequence[int]], Slots | None]  # slots, ranks → every expert held by them; None: too few
    restore: Callable[[Slots, Sequence[int]], Slots]  # slots, ranks → more replicas; equal: nothing to do
    part: Callable[[Slots, Slots], Slots] = lambda slots, goal: goal  # as much of a change as one epoch should make
    orders: Literal["any", "sorted"] = "any"  # any: an engine is in each order of ranks once (Gloo). sorted: NCCL
    window_s: float = 0.02  # losses within it are one epoch
    heartbeat_timeout_s: float = 1.0
    start_grace_s: float = 30.0  # at the very first start, for ranks to come
    restart_grace_s: float = 5.0  # for a lost worker to come back, before a generation starts without it
    settle_s: float = 0.25  # after the service died, for the engines that die with it
    service_timeout_s: float = 30.0
    fence_timeout_s: float = 3.0
    join_timeout_s: float = 60.0
    ready_timeout_s: float = 600.0
    persist_timeout_s: float = 10.0
    enter_timeout_s: float = 10.0  # what a repair has to load included
    prefetch_timeout_s: float = 600.0
    stall_s: float = 20.0  # busy, and yet nobody makes a step
    max_tick_gap_s: float = 0.5  # a driver that stood still for longer judges nobody by that time

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or len(self.hosts) != self.num_ranks:
            raise ValueError(f"hosts: found {len(self.hosts)}, expected num_ranks, {self.num_ranks}, and at least 1")
        if self.orders not in ("any", "sorted"):
            raise ValueError(f"orders: found {self.orders!r}, expected 'any' or 'sorted'")
        for name, value in vars(self).items():
            if name.endswith("_s") and not value > 0:
                raise ValueError(f"{name}: found {value!r}, expected more than 0 seconds")


@dataclass
class Recovery:
    """How one epoch came to be, whatever caused it. Times are the driver's; None: not reached (yet)."""

    cause: str  # "start", "loss", "restart" (a new generation), "join", "drain", or of MOVES
    began: float  # first evidence, or the decision to switch
    reasons: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    fenced: float | None = None
    epoch: int | None = None
    committed: float | None = None
    announced: float | None = None
    entered: dict[int, float] = field(default_factory=dict)  # by rank
    served: float | None = None


@dataclass
class Worker:
    """A registered worker that is not lost."""

    rank: int
    first: int  # the incarnation of its hello
    incarnation: int  # of its engine
    stage: Literal["waiting", "starting", "joined", "ready"] = "waiting"  # of its engine, in this generation
    started: bool = False  # it has been told to start an engine
    arrived: int | None = None  # where its engine last came to wait for the others: 0 at the start, or an epoch
    steps: int = 0
    served_steps: int = 0  # `steps` when the epoch began to serve
    busy: bool = False
    proved: bool = False  # its engine has been in an epoch that served


class Membership:
    """Not thread-safe. Ranks and numbers of events may be stale: those change nothing."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state: State = "STARTING"
        self.reason = ""
        self.generation = 0
        self.epoch: Epoch | None = None  # the last announced
        self.recoveries: deque[Recovery] = deque(maxlen=256)  # of announced epochs
        self._number = self._incarnation = 0  # the last ones used
        self._timers = Timers()
        self._ticked: float | None = None
        self._out: list[Action] = []
        self._workers: dict[int, Worker] = {}  # by rank
        self._dismissed: dict[int, int] = {}  # rank → its last lost incarnation
        self._strikes: dict[int, int] = {}  # rank → times it was lost since it last served
        self._served_ever = False
        # The generation
        self._phase: Literal["new", "gather", "service", "join", "load", "run"] = "new"
        self._services: list[int] = []  # running, the one before the current included until nobody needs it
        self._nodes: tuple[int, ...] = ()
        self._base: Slots = np.empty((0, 0, 0), np.int32)  # the plan for all nodes: what a joiner brings
        self._used: dict[tuple[int, ...], tuple[int, ...]] = {}  # announced orders → the last incarnations in them
        # The mesh
        self._members: list[int] = []  # in mesh order and not lost; before the first epoch those that will form it
        self._slots: Slots = self._base  # what they hold, or will once they entered
        self._stepping = False  # they were told to enter an epoch, and not to abort it
        self._oldest = 0  # the first epoch that a member may be stepping in: not the last while one is entered
        self._fresh = True  # no epoch in this generation yet
        self._pending: Epoch | None = None  # committed, not announced
        self._persisted = False
        self._cause = ""  # of the last committed epoch
        self._recovery: Recovery | None = None  # of the epoch being made, then of the last
        self._entering: set[int] = set()
        self._leaving: set[int] = set()  # to be drained; those outside _members have been told
        self._goal: Slots | None = None  # what the members shall come to hold, beside serving
        self._move = ""  # why, of MOVES
        self._target: Slots | None = None  # the next part of it, while it is fetched
        self._fetching: set[int] = set()
        self._unexplained = 0  # failures without a culprit since the last step
        self._tried: Any = None  # what was found to have too few slots: plans are not made anew every tick

    def restore_from(self, epoch: int, incarnation: int, generation: int) -> None:
        """Go on after a driver that died: `numbers` as it persisted them. Before the first event."""
        self._number, self._incarnation, self.generation = epoch, incarnation, generation

    def take_over(
        self,
        epoch: Epoch,
        nodes: tuple[int, ...],
        used: Mapping[tuple[int, ...], tuple[int, ...]],
        entered: Mapping[int, int],
        now: float,
    ) -> list[Action]:
        """Go on with the workers of a driver that died, before the first event and after `restore_from`.

        epoch, nodes, used: the last epoch that was persisted, the nodes of its generation, whose service lives, and the
        orders it has seen, with the last incarnations in each. entered: of the epoch's ranks whose engines were found,
        the last epoch each has entered. If that is this one for all, they serve. If not, the others are lost, and those
        here recover: it is not known who waits for whom.
        """
        self.epoch, self._nodes, self._slots = epoch, nodes, epoch.slots
        self._phase, self._fresh, self._stepping, self._served_ever = "run", False, True, True
        self._base = plan if (plan := self.rules.plan(nodes)) is not None else epoch.slots
        self._services, self._used = [epoch.generation], {**used, epoch.order: epoch.incarnations}
        self._members, self._oldest = list(epoch.order), epoch.number
        for rank, incarnation in zip(epoch.order, epoch.incarnations, strict=True):
            self._workers[rank] = Worker(rank, incarnation, incarnation, "ready", started=True)
            self._timers.start(self.rules.heartbeat_timeout_s, now, "heartbeat", rank)
        for rank in nodes:  # a new engine of theirs may have begun to join, and nobody knows of it any more
            if rank not in epoch.order:
                self._out.append(Fence(rank, 0, self.generation, nodes.index(rank)))
                self._timers.start(self.rules.fence_timeout_s, now, "fence", rank, 0)
        missing = [rank for rank in epoch.order if rank not in entered]
        if missing:
            self._lose(dict.fromkeys(missing, "it was not there when another coordinator took over"), now)
        elif any(number != epoch.number for number in entered.values()):
            self._note("loss", f"not all ranks had entered epoch {epoch.number} when the coordinator was lost", now)
            self._halt(now)
        else:
            self._serve(epoch, now)
        return self._advance(now)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """(epoch, incarnation, generation) last used. To be persisted before the actions they came with are done."""
        return self._number, self._incarnation, self.generation

    @property
    def due(self) -> float:
        """When the next timer ends; infinity: none runs."""
        return self._timers.due

    def ahead(self) -> list[tuple[int, ...]]:
        """The orders of the meshes that the loss of one host would leave, for engines to make ready. None where there
        are many hosts: few of those meshes could be made ready, and hardly the right one."""
        orders = (self._unused_order(members, []) for members in self._left_by_a_loss())
        return [order for order in orders if order is not None]

    def _left_by_a_loss(self) -> list[list[int]]:
        """The members that the loss of each host would leave, unless that is nobody; [] where there are many hosts."""
        hosts = self.rules.hosts
        present = dict.fromkeys(hosts[r] for r in self._members)
        if not 1 < len(present) <= _MOST_AHEAD:
            return []
        return [[r for r in self._members if hosts[r] != host] for host in present]

    def status(self) -> dict[str, Any]:
        """JSON-serialisable; `epoch` is the last announced, 0: none."""
        ranks, serving = [], set() if self.epoch is None else set(self.epoch.incarnations)
        for rank, host in enumerate(self.rules.hosts):
            worker = self._workers.get(rank)
            live = worker is not None and worker.incarnation in serving
            state = "lost" if worker is None else "live" if live else "joining"
            incarnation = worker.incarnation if worker else self._dismissed.get(rank)
            ranks.append({"rank": rank, "host": host, "state": state, "incarnation": incarnation})
        numbers = {"epoch": self.epoch.number if self.epoch else 0, "generation": self.generation}
        return {"state": self.state, "reason": self.reason, **numbers, "ranks": ranks}

    # Events of workers

    def hello(self, rank: int, host: str, now: float) -> tuple[int, list[Action]]:
        """A worker registers. Its incarnation, to be welcomed with before the actions are carried out."""
        self._incarnation = incarnation = self._incarnation + 1
        hosts = self.rules.hosts
        if not 0 <= rank < len(hosts) or host != hosts[rank]:
            expected = f"host {hosts[rank]!r}" if 0 <= rank < len(hosts) else f"a rank from 0 to {len(hosts) - 1}"
            return incarnation, [Dismiss(rank, incarnation, f"found rank {rank} on host {host!r}, expected {expected}")]
        if rank in self._workers:
            self._lose({rank: "it registered again"}, now)
        self._workers[rank] = Worker(rank, incarnation, incarnation)
        self._timers.stop("back", rank)
        self._timers.start(self.rules.heartbeat_timeout_s, now, "heartbeat", rank)
        strikes = self._strikes.get(rank, 0)
        if strikes > 1:  # it keeps failing while the others wait for it: less and less often
            self._timers.start(self.rules.restart_grace_s * 2 ** min(strikes - 2, 6), now, "hold", rank)
        if rank not in self._nodes and not self._timers.running("grow"):
            self._timers.start(self.rules.restart_grace_s, now, "grow")
        return incarnation, self._advance(now)

    def heartbeat(self, rank: int, incarnation: int, now: float, running: bool, stopped: bool) -> list[Action]:
        """`running` changes nothing: an engine that ended is `lost`, one that has not started yet is waited for."""
        if not self._registered(rank, incarnation):
            late = self._dismissed.get(rank) == incarnation
            return [Dismiss(rank, incarnation, "this incarnation was lost")] if late else []
        self._timers.start(self.rules.heartbeat_timeout_s, now, "heartbeat", rank)
        if not stopped:
            return []  # thousands come in a second
        self._lose({rank: "its engine is stopped"}, now)
        return self._advance(now)

    def lost(self, rank: int, incarnation: int, evidence: str, now: float, host: bool = False) -> list[Action]:
        """The stream broke, or the engine ended. `host`: the evidence is about all ranks of this one's host."""
        if self._registered(rank, incarnation):
            hosts = self.rules.hosts
            gone = [r for r in self._workers if r == rank or (host and hosts[r] == hosts[rank])]
            self._lose(dict.fromkeys(gone, evidence), now)
        return self._advance(now)

    def arrived(self, rank: int, incarnation: int, number: int, now: float) -> list[Action]:
        """The engine came to where it waits for the others: the service (0), or the barrier of epoch `number`.

        Whoever has arrived is not to blame when a deadline passes. Without this event a deadline blames all or nobody.
        """
        if worker := self._engine(rank, incarnation):
            worker.arrived = number
        return self._advance(now)

    def joined(self, rank: int, incarnation: int, generation: int, now: float) -> list[Action]:
        """Connected to the service, devices exchanged: nobody waits for this node any more."""
        worker = self._engine(rank, incarnation)
        if worker and generation == self.generation and worker.stage == "starting":
            worker.stage = "joined"
            self._timers.stop("join", rank)
        return self._advance(now)

    def ready(self, rank: int, incarnation: int, generation: int, now: float) -> list[Action]:
        worker = self._engine(rank, incarnation)
        if worker and generation == self.generation and worker.stage in ("starting", "joined"):
            worker.stage = "ready"
            self._timers.stop("join", rank)
            self._timers.stop("ready", rank)
        return self._advance(now)

    def entered(self, rank: int, incarnation: int, number: int, now: float) -> list[Action]:
        epoch = self.epoch
        if self._engine(rank, incarnation) and epoch and number == epoch.number and rank in self._entering:
            self._entering.remove(rank)
            if self._recovery:
                self._recovery.entered[rank] = now
            if self._entering:
                return []
            self._serve(epoch, now)
        return self._advance(now)

    def failed(self, rank: int, incarnation: int, number: int, now: float) -> list[Action]:
        """A collective failed though nobody said abort: somebody is lost, and not the one who says so."""
        if self._engine(rank, incarnation) and self._stepping and number >= self._oldest:
            self._drop_pending()
            self._note("loss", f"rank {rank}: a collective failed", now)
            self._halt(now)
            self._timers.start(self.rules.heartbeat_timeout_s + self.rules.window_s, now, "culprit")
        return self._advance(now)

    def prefetched(self, rank: int, incarnation: int, now: float) -> list[Action]:
        if self._engine(rank, incarnation):
            self._fetching.discard(rank)
        return self._advance(now)

    def progress(self, rank: int, incarnation: int, steps: int, busy: bool, now: float) -> list[Action]:
        """`steps` its engine has made, and whether it has work."""
        if worker := self._engine(rank, incarnation):
            moved, idle = steps > worker.steps, not any(self._workers[r].busy for r in self._members)
            worker.steps, worker.busy = steps, busy
            self._unexplained = 0 if moved else self._unexplained
            if (moved or idle) and self._timers.running("stall"):
                self._timers.start(self.rules.stall_s, now, "stall")
        return self._advance(now)

    # Events of the service, the disk, the operator and the clock

    def service_up(self, generation: int, now: float) -> list[Action]:
        if generation == self.generation and self._phase == "service":
            self._timers.stop("service")
            self._phase = "join"
            for rank in self._nodes:
                self._start_engine(self._workers[rank], now)
        return self._advance(now)

    def service_lost(self, generation: int, now: float) -> list[Action]:
        if generation in self._services:
            self._service_died(generation, "the JAX service was lost", now)
        return self._advance(now)

    def fenced(self, rank: int, incarnation: int, now: float) -> list[Action]:
        if self._timers.running("fence", rank, incarnation):
            self._timers.stop("fence", rank, incarnation)
            recovery = self._recovery
            if recovery and recovery.announced is None and rank in recovery.lost:
                recovery.fenced = now
        return self._advance(now)

    def persisted(self, number: int, now: float) -> list[Action]:
        if self._pending and number == self._pending.number:
            self._persisted = True
            self._timers.stop("persist")
        return self._advance(now)

    def drain(self, host: str, now: float) -> tuple[str | None, list[Action]]:
        """Take a host's ranks out without a failure, until they say hello again. A reason: refused, nothing changed."""
        ranks = [r for r in sorted(self._workers) if self.rules.hosts[r] == host]
        staying = sorted(set(self._members) - self._leaving - set(ranks))
        if not ranks:
            present = sorted({self.rules.hosts[r] for r in self._workers})
            return f"host: found {host!r}, expected one with present ranks: {', '.join(present) or 'none'}", []
        if self._phase != "run" or self._fresh or self.state == "UNSERVABLE":
            return f"found the state {self.state}, expected SERVING: try again then", []
        if not staying or self.rules.repair(self._slots, staying) is None:
            return f"host {host}: the remaining ranks {staying} have too few slots for all experts", []
        for rank in ranks:
            if rank in self._members:
                self._leaving.add(rank)
            elif rank not in self._leaving:
                self._lose({rank: "drained"}, now)
        if self.state == "SERVING" and self._leaving:
            self._say("DRAINING", f"host {host}")
        return None, self._advance(now)

    @property
    def moving(self) -> bool:
        """Whether experts are being moved beside serving."""
        return self._goal is not None

    @property
    def busy(self) -> str | None:
        """Why experts cannot be moved now."""
        still = not (self._goal is not None or self._pending or self._entering)
        if self.state == "SERVING" and still:
            return None
        found = "a change on its way" if self.state == "SERVING" else self.state
        return f"found {found}, expected the state SERVING and no change: try again then"

    def rebalance(self, number: int, goal: Slots, now: float) -> tuple[str | None, list[Action]]:
        """Have the members of epoch `number` hold `goal`, a part at a time. A reason: refused, nothing changed."""
        refused = self.busy
        if refused is None and (self.epoch is None or self.epoch.number != number):
            refused = f"found epoch {self.epoch and self.epoch.number}, expected {number}: it was made for that"
        if refused is None:
            self._goal, self._move = goal, "rebalance"
            self._approach(now)
        return refused, self._advance(now)

    def resume(self, now: float) -> None:
        """The driver stood still: nobody is judged by that time."""
        self._timers.restart(now)
        self._ticked = now

    def tick(self, now: float) -> list[Action]:
        """The ladder: what follows when a wait has lasted long enough."""
        if self._ticked is not None and now - self._ticked > self.rules.max_tick_gap_s:
            self.resume(now)
        self._ticked = now
        gone: dict[int, str] = {}
        for key in self._timers.expired(now):
            match key:
                case ("heartbeat", rank):
                    gone[rank] = f"no heartbeat for {self.rules.heartbeat_timeout_s} s"
                case ("ready", rank):
                    gone[rank] = f"not ready within {self.rules.ready_timeout_s} s"
                case ("join", rank) if self._phase != "join":
                    gone[rank] = f"did not join within {self.rules.join_timeout_s} s"
                case ("join", _):
                    late = [r for r in self._nodes if self._workers[r].stage == "starting"]
                    self._timers.stop("join")
                    gone |= self._blame(late, 0, f"did not join within {self.rules.join_timeout_s} s", now)
                case ("enter",) if self.epoch:
                    reason = f"did not enter epoch {self.epoch.number} within {self.rules.enter_timeout_s} s"
                    gone |= self._blame(sorted(self._entering), self.epoch.number, reason, now)
                case ("stall",):
                    members = [self._workers[r] for r in self._members]
                    if any(worker.busy for worker in members):
                        victim = min(members, key=lambda w: (w.steps - w.served_steps, -w.rank))
                        gone[victim.rank] = f"no step for {self.rules.stall_s} s, though all ranks are well"
                    else:
                        self._timers.start(self.rules.stall_s, now, "stall")
                case ("culprit",):
                    self._unexplained += 1
                    if self._unexplained > 1:
                        self._gather_again("collectives fail and nobody is lost", now)
                case ("service",):
                    self._service_died(self.generation, "the JAX service does not start", now)
                case ("fence", rank, _):
                    self._service_died(self.generation, f"the JAX service does not fence rank {rank}", now)
                case ("persist",) if self._pending:
                    self._persist(now)
                case ("prefetch",):
                    self._prefetch(now)
                case _:  # window, gather, settle, back, hold, grow: _advance goes on when they no longer run
                    pass
        if gone := {rank: reason for rank, reason in gone.items() if rank in self._workers}:
            self._lose(gone, now)
        return self._advance(now)

    # Losses

    def _registered(self, rank: int, incarnation: int) -> bool:
        """Whether this is the rank's worker, though perhaps an engine ago."""
        worker = self._workers.get(rank)
        return worker is not None and worker.first <= incarnation <= worker.incarnation

    def _engine(self, rank: int, incarnation: int) -> Worker | None:
        worker = self._workers.get(rank)
        return worker if worker and worker.incarnation == incarnation else None

    def _blame(self, late: list[int], point: int, reason: str, now: float) -> dict[int, str]:
        """A deadline passed: who is lost for it. Those whom the others wait for; {} and a new generation when that is
        more than half, for then it says nothing about anybody."""
        absent = [r for r in late if self._workers[r].arrived != point]
        guilty = absent or late
        if 2 * len(guilty) <= len(self._members):
            return dict.fromkeys(guilty, reason)
        self._gather_again(f"ranks {', '.join(map(str, late))}: {reason}", now)
        return {}

    def _lose(self, gone: dict[int, str], now: float) -> None:
        """At once: fence and dismiss the lost, and if the mesh needed them, abort the others' collectives."""
        involved = [r for r in gone if r in self._members or r in self._leaving]
        for rank, reason in gone.items():
            self._retire(rank, reason, now)
        if involved:
            self._drop_pending()
            for rank in involved:
                self._note("loss", f"rank {rank}: {gone[rank]}", now).lost.append(rank)
            self._members = [r for r in self._members if r not in gone]
            if self._phase in ("service", "join") or (self._phase in ("load", "run") and not self._members):
                self._gather_again(f"rank {involved[0]} was lost: {gone[involved[0]]}", now)
            elif self._phase == "run":
                self._halt(now)
                self._timers.stop("culprit")
                if not self._timers.running("window"):
                    self._timers.start(self.rules.window_s, now, "window")
        elif self._pending and set(gone) & set(self._pending.order):
            self._drop_pending()  # a joiner that nobody had been told about: the mesh never knew it
            self._approach(now)  # what was put off for it

    def _retire(self, rank: int, reason: str, now: float) -> None:
        worker = self._workers.pop(rank)
        if worker.stage != "waiting" and self._phase in ("load", "run"):
            self._out.append(Fence(rank, worker.incarnation, self.generation, self._nodes.index(rank)))
            self._timers.start(self.rules.fence_timeout_s, now, "fence", rank, worker.incarnation)
        self._out.append(Dismiss(rank, worker.incarnation, reason))
        self._dismissed[rank] = worker.incarnation
        if worker.stage != "waiting" and not worker.proved:
            self._strikes[rank] = self._strikes.get(rank, 0) + 1
        for kind in ("heartbeat", "join", "ready", "hold"):
            self._timers.stop(kind, rank)
        self._timers.start(self.rules.restart_grace_s, now, "back", rank)
        self._leaving.discard(rank)

    def _halt(self, now: float) -> None:
        """Nobody steps until the next epoch."""
        for rank in self._leaving - set(self._members):  # told to leave; where they stand now is not known
            self._retire(rank, "drained", now)
        self._stepping = False
        self._entering.clear()
        self._goal = self._target = None
        for kind in ("enter", "stall", "prefetch"):
            self._timers.stop(kind)
        if self.epoch and self._recovery and not self._fresh:  # at every further loss, too
            ranks = tuple(self._members)
            self._out.append(Abort(ranks, self._incarnations(ranks), self.epoch.number))
            self._say_recovering(self._recovery.reasons[-1])

    def _drop_pending(self) -> None:
        self._pending = None
        self._timers.stop("persist")
        if self._recovery and self._recovery.announced is None and not self._recovery.reasons:
            self._recovery = None  # of a join, a drain: what comes now has another cause

    def _note(self, cause: str, reason: str, now: float) -> Recovery:
        """The record of the epoch to come."""
        if self._recovery is None or self._recovery.announced is not None:
            self._recovery = Recovery(cause, now)
        if reason and len(self._recovery.reasons) < 64:
            self._recovery.reasons.append(reason)
        return self._recovery

    # Generations

    def _service_died(self, generation: int, reason: str, now: float) -> None:
        self._stop_service(generation)
        if generation == self.generation:
            self._gather_again(reason, now)
        self._timers.start(self.rules.settle_s, now, "settle")

    def _stop_service(self, generation: int) -> None:
        if generation in self._services:
            self._services.remove(generation)
            self._out.append(StopService(generation))

    def _gather_again(self, reason: str, now: float) -> None:
        """Give up the generation. Its service and engines run on until the next one's replace them."""
        if self._phase in ("new", "gather"):
            return
        self._drop_pending()
        self._note("restart", reason, now)
        if self._phase == "service":  # nobody has come to it
            self._stop_service(self.generation)
        self._timers.keep("heartbeat", "back", "hold")
        self._phase, self._nodes, self._members = "gather", (), []
        self._goal, self._target, self._stepping, self._tried = None, None, False, None
        self._entering.clear()
        for worker in self._workers.values():
            worker.stage, worker.busy = "waiting", False
        self._say_recovering(reason)

    def _eligible(self) -> list[int]:
        return [r for r in sorted(self._workers) if not self._timers.running("hold", r)]

    def _gather(self, now: float) -> None:
        """Start the next generation once all are here, or those that may still come had their time."""
        present = self._eligible()
        missing = [r for r in range(self.rules.num_ranks) if r not in present]
        coming = self._timers.running("gather") or any(self._timers.running("back", r) for r in missing)
        if self._timers.running("settle") or (missing and coming) or tuple(self._workers) == self._tried:
            return
        base = self.rules.plan(present) if present else None
        if base is None and len(present) < len(self._workers):
            present = sorted(self._workers)
            base = self.rules.plan(present)
        if base is None:
            self._tried = tuple(self._workers)
            self._say("UNSERVABLE", f"ranks {present} have too few slots for all experts: waiting for more")
        elif missing and self._tried is not None:  # enough at last: those who come a little later are taken along
            self._tried = None
            self._timers.start(self.rules.restart_grace_s, now, "gather")
        else:
            self._start_generation(tuple(present), base, now)

    def _start_generation(self, nodes: tuple[int, ...], base: Slots, now: float) -> None:
        self.generation += 1
        for old in self._services[:-1]:
            self._stop_service(old)
        self._services.append(self.generation)
        self._phase, self._nodes, self._base, self._slots = "service", nodes, base, base
        self._members, self._used, self._fresh, self._unexplained, self._tried = list(nodes), {}, True, 0, None
        self._timers.keep("heartbeat", "back", "hold")
        self._timers.start(self.rules.service_timeout_s, now, "service")
        self._out.append(StartService(self.generation, nodes))
        self._say_recovering(f"generation {self.generation} starts")

    def _start_engine(self, worker: Worker, now: float) -> None:
        if worker.started:
            self._incarnation += 1
            worker.incarnation = self._incarnation
        worker.stage, worker.started, worker.proved, worker.arrived = "starting", True, False, None
        worker.steps = worker.served_steps = 0
        rank = worker.rank
        self._timers.start(self.rules.join_timeout_s, now, "join", rank)
        self._timers.start(self.rules.ready_timeout_s, now, "ready", rank)
        node = self._nodes.index(rank)
        self._out.append(StartEngine(rank, worker.incarnation, self.generation, node, self._base[:, rank]))

    # Epochs

    def _advance(self, now: float) -> list[Action]:
        """Go on as far as what is known allows, after every event. The actions since the last call."""
        if self._phase == "new":
            self._phase = "gather"
            self._timers.start(self.rules.start_grace_s, now, "gather")
        stages = {self._workers[r].stage for r in self._members}
        if self._phase == "join" and "starting" not in stages:
            self._phase = "load"
            for old in self._services[:-1]:
                self._stop_service(old)
        if self._phase == "load" and stages == {"ready"}:
            self._phase = "run"
        if self._phase == "run":
            self._switch(now)
        if self._phase in ("load", "run"):
            self._admit(now)
        if self._phase == "gather":
            self._gather(now)
        actions, self._out = self._out, []
        return actions

    def _admit(self, now: float) -> None:
        """Let the nodes that came back load. The old incarnation's fence comes first, or it would hit the new one."""
        for rank, worker in self._workers.items():
            held = self._timers.running("hold", rank) and self.state != "UNSERVABLE"
            if worker.stage == "waiting" and rank in self._nodes and not held:
                if self._timers.running("fence", rank):
                    continue
                if self._nodes.index(rank) == 0:
                    self._out.append(Forget(self.generation))
                self._start_engine(worker, now)

    def _switch(self, now: float) -> None:
        """One epoch at a time: announce the committed one, or commit the most urgent."""
        joiners = self._joiners()
        if self._pending:
            if self._persisted and not self._timers.running("fence"):
                self._announce(self._pending, now)
        elif self._entering or self._timers.running("window") or self._timers.running("culprit"):
            pass
        elif not self._stepping:
            self._recover(joiners, now)
        elif self._leaving:
            self._drain(now)
        elif joiners:
            self._take_in(joiners, now)
        elif self._outsiders():
            self._gather_again(f"ranks {self._outsiders()} are new", now)
        elif self._target is not None and not self._fetching:
            self._commit(self._move, self._members, [], self._target, now)

    def _joiners(self) -> list[int]:
        told = {*self._members, *self._leaving}
        return [r for r in sorted(self._workers) if self._workers[r].stage == "ready" and r not in told]

    def _outsiders(self) -> list[int]:
        """Present ranks that only a new generation can take in, once others like them had time to come."""
        outside = [r for r in self._eligible() if r not in self._nodes]
        return [] if self._timers.running("grow") else outside

    def _with_rows_of(self, joiners: list[int]) -> Slots:
        """The members' slots, and those that the joiners have loaded. Without joiners the epoch's own array."""
        if not joiners:
            return self._slots
        slots = self._slots.copy()
        slots[:, joiners] = self._base[:, joiners]
        return slots

    def _recover(self, joiners: list[int], now: float) -> None:
        """Nobody steps: commit those who can go on, alone if they can; or say UNSERVABLE, and they wait."""
        known = tuple(map(tuple, (self._members, joiners, self._outsiders(), self._eligible(), self._workers)))
        if known == self._tried:
            return
        for ready in ([], joiners) if joiners else ([],):
            slots = self.rules.repair(self._with_rows_of(ready), sorted([*self._members, *ready]))
            if slots is not None:
                return self._commit("start" if self._fresh else "loss", self._members, ready, slots, now)
        if self._outsiders() and self.rules.plan(self._eligible()) is not None:
            return self._gather_again(f"ranks {self._outsiders()} are new, and needed", now)
        self._tried = known
        self._say("UNSERVABLE", f"ranks {sorted(self._members)} have too few slots for all experts: waiting for more")

    def _take_in(self, joiners: list[int], now: float) -> None:
        """A rank that meets one that is alone, and has been in both orders of the two, relieves it: that one leaves as
        in a drain, and comes back with a new engine, for which all orders are free."""
        members, slots = self._members, self._with_rows_of(joiners)
        if len(members) == len(joiners) == 1 and self._unused_order(members, joiners) is None:
            alone = self.rules.repair(slots, joiners)
            if alone is not None:
                members, slots = [], alone
        self._commit("join", members, joiners, slots, now)

    def _drain(self, now: float) -> None:
        staying = [r for r in self._members if r not in self._leaving]
        slots = self.rules.repair(self._slots, sorted(staying)) if staying else None
        if slots is None:
            self._leaving.clear()
            self._say("SERVING", "drain dropped: by now the remaining ranks have too few slots for all experts")
        else:
            self._commit("drain", staying, [], slots, now)

    def _commit(self, cause: str, members: list[int], joiners: list[int], slots: Slots, now: float) -> None:
        order = tuple(members) if cause in MOVES else self._unused_order(members, joiners)
        if order is None:
            return self._gather_again(f"every order of ranks {sorted([*members, *joiners])} has been used", now)
        slots = np.array(slots, np.int32)
        slots[:, sorted(set(range(self.rules.num_ranks)) - set(order))] = -1
        slots.flags.writeable = False
        self._number += 1
        node = {r: i for i, r in enumerate(self._nodes)}
        nodes = tuple(node[r] for r in order)
        self._pending = Epoch(self._number, self.generation, order, self._incarnations(order), nodes, slots)
        self._cause, self._target, self._tried = cause, None, None
        self._timers.stop("prefetch")
        recovery = self._note(cause, "", now)
        recovery.joined, recovery.epoch, recovery.committed = list(joiners), self._number, now
        if not self._stepping:
            self._say_recovering(f"epoch {self._number} is committed")
        elif cause == "drain":
            self._say("DRAINING", f"ranks {sorted(self._leaving)}")
        self._persist(now)

    def _unused_order(self, members: list[int], joiners: list[int]) -> tuple[int, ...] | None:
        """The nearest to (members, joiners) that none of these engines has been in, joiners last if possible."""
        if self.rules.orders == "sorted":
            return tuple(sorted([*members, *joiners]))
        last = (head + tail for head in permutations(members) for tail in permutations(joiners))
        orders = chain(last, permutations([*members, *joiners]))
        return next((order for order in orders if self._is_free(order)), None)

    def _is_free(self, order: tuple[int, ...]) -> bool:
        """Whether these engines can form a communicator in this order: none has been in one. One rank needs none."""
        before = self._used.get(order, ())
        return len(order) == 1 or not any(
            self._workers[r].incarnation == i for r, i in zip(order, before, strict=False)
        )

    def worn(self) -> int | None:
        """A member whose engine should be replaced, by way of a drain, or orders run out: the members' own, or those
        of the ranks that the loss of a host would leave. Of the ranks concerned the one that has been there longest,
        and so on until they are free again. None where nothing runs out, or nothing would be won: of two ranks one is
        left in both orders, whichever is replaced."""
        if self.rules.orders == "sorted" or self.state != "SERVING" or len(self._members) < 3:
            return None
        for ranks in (self._members, *self._left_by_a_loss()):
            free = factorial(len(ranks)) - sum(not self._is_free(o) for o in self._used if set(o) == set(ranks))
            if len(ranks) > 1 and free <= (len(ranks) > 2):
                return min(ranks, key=lambda r: self._workers[r].incarnation)
        return None

    def _incarnations(self, ranks: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._workers[r].incarnation for r in ranks)

    def _persist(self, now: float) -> None:
        assert self._pending is not None
        self._persisted = False
        self._timers.start(self.rules.persist_timeout_s, now, "persist")
        self._out.append(Persist(self._pending))

    def _announce(self, epoch: Epoch, now: float) -> None:
        leavers = tuple(r for r in self._members if r not in epoch.order)
        self._out.append(Announce(epoch, not self._stepping and not self._fresh, leavers))
        self._leaving.update(leavers)
        self._oldest = self.epoch.number if self._stepping and self.epoch else epoch.number
        self.epoch, self._pending, self._fresh, self._stepping = epoch, None, False, True
        self._members, self._slots, self._entering = list(epoch.order), epoch.slots, set(epoch.order)
        self._used[epoch.order] = epoch.incarnations
        self._timers.stop("stall")
        self._timers.start(self.rules.enter_timeout_s, now, "enter")
        recovery = self._note(self._cause, "", now)
        recovery.announced = now
        self.recoveries.append(recovery)

    def _serve(self, epoch: Epoch, now: float) -> None:
        self._timers.stop("enter")
        self._served_ever, self._oldest = True, epoch.number
        if self._recovery:
            self._recovery.served = now
        self._out.append(Serve(epoch))
        for rank in self._leaving - set(self._members):
            self._retire(rank, "drained", now)
        for rank in self._members:
            worker = self._workers[rank]
            worker.proved, worker.served_steps = True, worker.steps
            self._strikes.pop(rank, None)
            self._timers.stop("hold", rank)
        self._timers.start(self.rules.stall_s, now, "stall")
        self._say("SERVING", "")
        if self._cause not in MOVES:
            self._goal, self._move = self.rules.restore(epoch.slots, sorted(epoch.order)), "restore"
        self._approach(now)

    def _approach(self, now: float) -> None:
        """Fetch the next part of what the members shall hold."""
        if self._goal is not None and np.array_equal(self._goal, self._slots):
            self._goal = None
        if self._goal is not None:
            self._target = target = self.rules.part(self._slots, self._goal)
            self._fetching = {r for r in self._members if not np.array_equal(target[:, r], self._slots[:, r])}
            self._prefetch(now)

    def _prefetch(self, now: float) -> None:
        if self._target is not None:
            self._timers.start(self.rules.prefetch_timeout_s, now, "prefetch")
            for rank in sorted(self._fetching):
                self._out.append(Prefetch(rank, self._workers[rank].incarnation, self._target[:, rank]))

    def _say_recovering(self, reason: str) -> None:
        self._say("RECOVERING" if self._served_ever else "STARTING", reason)

    def _say(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            self._out.append(StateChange(state, reason))
