"""A world for the membership: services, supervisors and engines that fail in every way, and the wires between them.

It carries out what the membership asks for and tells it what happens, by a clock of its own, and asserts at every turn
what must never be. `history` is one course of such a world, drawn from a seed.
"""

import heapq
import random
from collections import Counter
from functools import lru_cache

import numpy as np

from moe_jax.placement import part
from serving.membership import Membership, Rules

LAYERS = 2


# A placement, small and slow: round robin, then whatever is missing into what is there twice.


def placement(num_ranks, experts, size):
    """(plan, repair, restore) for `size` slots a layer and rank."""

    def plan(ranks):
        return planned(tuple(ranks))

    def repair(slots, ranks):
        return repaired(slots.tobytes(), tuple(ranks))

    def restore(slots, ranks):
        return restored(slots.tobytes(), tuple(ranks))

    @lru_cache(None)
    def planned(ranks):
        if len(ranks) * size < experts:
            return None
        slots = np.full((LAYERS, num_ranks, size), -1, np.int32)
        for layer in range(LAYERS):
            for position in range(len(ranks) * size):
                slots[layer, ranks[position % len(ranks)], position // len(ranks)] = (position + layer) % experts
        return slots

    def masked(data, ranks):
        slots = np.frombuffer(data, np.int32).reshape(LAYERS, num_ranks, size).copy()
        slots[:, [r for r in range(num_ranks) if r not in ranks]] = -1
        return slots

    @lru_cache(None)
    def repaired(data, ranks):
        slots = masked(data, ranks)
        for rows in slots:
            count = Counter(rows[list(ranks)].ravel().tolist())
            spare = [(r, s) for r in ranks for s in range(size)]
            for missing in sorted(set(range(experts)) - set(count)):
                place = next((p for p in spare if rows[p] == -1 or count[int(rows[p])] > 1), None)
                if place is None:
                    return None
                count[int(rows[place])] -= 1
                count[missing] += 1
                rows[place] = missing
        return slots

    @lru_cache(None)
    def restored(data, ranks):
        slots = masked(data, ranks)
        for rows in slots:
            while True:
                count = Counter(rows[list(ranks)].ravel().tolist())
                few = min(range(experts), key=lambda e: count[e])
                many = -1 if count[-1] else max(range(experts), key=lambda e: count[e])
                if many >= 0 and count[many] - count[few] < 2:
                    break
                rows[next((r, s) for r in ranks for s in range(size) if rows[r, s] == many)] = few
        return slots

    return plan, repair, restore


# A world: services, supervisors, engines, and the wires between them


class Service:
    def __init__(self, generation, nodes):
        self.generation, self.nodes = generation, nodes
        self.alive, self.stopped, self.open, self.reported = True, False, False, False
        self.came = {}  # node → its engine, or None once it was fenced
        self.topology = None  # the incarnation of node 0 that wrote it


class Engine:
    def __init__(self, process, incarnation, generation, node):
        self.process, self.incarnation, self.generation, self.node = process, incarnation, generation, node
        self.rank = process.rank
        self.alive, self.stopped = True, False
        self.stuck = False  # deaf to aborts
        self.state = "starting"  # connecting, loading, waiting, entering, stepping, left
        self.epoch = self.next = None
        self.steps = 0


class Process:
    """A supervisor, and its stream to the coordinator. A new one for every start of the worker."""

    def __init__(self, rank):
        self.rank = rank
        self.alive, self.stopped, self.engine = True, False, None
        self.up = self.down = 0.0  # when the last message sent arrives: a stream keeps its order
        self.held_until = 0.0  # by a network that is cut
        self.inbox = []  # while stopped
        self.incarnation = None  # of its hello, known to the coordinator only
        self.newest = None  # of its engine, or the one that is on its way


class World:
    """Drives a Membership as a coordinator would, and checks everything it does."""

    def __init__(self, seed, tally):
        self.rng = rng = random.Random(seed)
        self.tally = tally
        self.now, self.heap, self.sequence = 0.0, [], 0
        ranks = rng.choice((1, 2, 2, 3, 3, 4, 4, 4, 5, 6))
        per_host = rng.choice((1, 1, 2))
        self.experts = rng.randint(1, 6)
        size = -(-self.experts * rng.choice((1, 2, 2, 3)) // ranks)
        self.rules = Rules(
            ranks,
            tuple(f"host{r // per_host}" for r in range(ranks)),
            *placement(ranks, self.experts, size),
            lambda slots, goal: part(slots, goal, rng.choice((1, size))),
            orders=rng.choice(("any", "any", "sorted")),
            start_grace_s=2.0,
            restart_grace_s=1.0,
            settle_s=0.2,
            service_timeout_s=1.5,
            fence_timeout_s=0.8,
            join_timeout_s=2.5,
            ready_timeout_s=5.0,
            persist_timeout_s=0.4,
            enter_timeout_s=1.5,
            prefetch_timeout_s=1.5,
            stall_s=2.0,
        )
        self.machine = Membership(self.rules)
        self.faulty = True  # faults may still happen
        self.stalled_until, self.backlog = 0.0, []
        self.processes = {}  # rank → the latest
        self.launched: list[Process] = []  # all of them, those too that have not registered
        self.streams = {}  # rank → the process that said hello last
        self.by_incarnation = {}  # incarnation → Process
        self.engines = {}  # incarnation → Engine
        self.services = {}  # generation → Service
        self.arrived = {}  # epoch → incarnations at its barrier
        self.cuts = set()  # pairs of ranks that cannot talk
        self.crashing = {}  # rank → where its engines die, always
        self.gone = set()  # ranks that are not started again
        # What has been promised
        self.content = {}  # number → what was persisted under it
        self.on_disk = set()
        self.numbers = (0, 0, 0)
        self.announced = []
        self.orders = {}  # generation → order → incarnations that have been in it
        self.fencing = set()  # (rank, incarnation) without an answer
        self.out = set()  # incarnations that were fenced or dismissed
        self.started = set()  # incarnations that an engine was started with
        self.told, self.aborted = {}, {}  # incarnation → the last epoch it was told of, told to abort
        self.survivors = set()  # as those were told who were told to abort last
        self.has_entered = {}  # epoch → incarnations that said so
        self.forgotten = False
        self.served = None
        for rank in range(ranks):
            if rng.random() < 0.93:
                self.after(rng.choice((0.0, 0.1, 1.0, 2.5)) * rng.random(), self.launch, rank)
            else:
                self.after(rng.uniform(2.0, 9.0), self.launch, rank)
        self.after(0.0, self.tick)

    def at(self, time, act, *args):
        self.sequence += 1
        heapq.heappush(self.heap, (time, self.sequence, act, args))

    def after(self, delay, act, *args):
        self.at(self.now + delay, act, *args)

    def run(self, until, done=lambda: False):
        """Whether `done` before `until`."""
        while self.heap[0][0] <= until:
            if done():
                return True
            self.now, _, act, args = heapq.heappop(self.heap)
            act(*args)
        return done()

    def chance(self, probability):
        return self.faulty and self.rng.random() < probability

    # Messages

    def tell(self, act, *args):
        """The coordinator handles an event now, or when it moves again."""
        if self.now < self.stalled_until or self.backlog:
            self.backlog.append((act, args))
        else:
            act(*args)

    def stand_still(self, seconds):
        self.stalled_until = max(self.stalled_until, self.now + seconds)
        self.at(self.stalled_until, self.move_again)

    def move_again(self):
        if self.now >= self.stalled_until:
            backlog, self.backlog = self.backlog, []
            for act, args in backlog:
                act(*args)

    def upward(self, process, act, *args):
        process.up = max(process.up, process.held_until, self.now + self.rng.choice((0.001, 0.004, 0.03)))
        self.at(process.up, self.tell, act, *args)

    def downward(self, process, act, *args):
        process.down = max(process.down, process.held_until, self.now + self.rng.choice((0.001, 0.004, 0.03)))
        self.at(process.down, self.receive, process, act, *args)

    def receive(self, process, act, *args):
        if not process.alive:
            return
        if process.stopped:
            process.inbox.append((act, args))
        else:
            act(process, *args)

    def say(self, engine, event, *args):
        """An engine's frame."""
        if engine.alive and not engine.process.stopped:
            self.upward(engine.process, self.frame, engine, event, *args)

    # The coordinator

    def event(self, name, *args):
        self.carry_out(getattr(self.machine, name)(*args, self.now))

    def frame(self, engine, event, *args):
        """A driver that knows only the stream takes an engine's last words for those of the one it has just started."""
        newest = engine.process.newest if self.rng.random() < 0.3 else engine.incarnation
        self.event(event, engine.rank, newest, *args)

    def supervisor_event(self, process, name, *args):
        if process.incarnation is not None:
            self.event(name, process.rank, process.incarnation, *args)

    def heard(self, process):
        """A heartbeat; its tag may lag behind an engine that was just started."""
        engine, worker = process.engine, self.machine._workers.get(process.rank)
        tag = process.incarnation
        if worker and worker.first == tag and self.rng.random() < 0.5:
            tag = worker.incarnation
        running = engine is not None and engine.alive
        stopped = engine is not None and engine.alive and engine.stopped
        self.carry_out(self.machine.heartbeat(process.rank, tag, self.now, running, stopped))

    def hello(self, process):
        incarnation, actions = self.machine.hello(process.rank, self.rules.hosts[process.rank], self.now)
        assert incarnation not in self.by_incarnation and incarnation not in self.started
        process.incarnation = incarnation
        self.by_incarnation[incarnation] = process
        self.streams[process.rank] = process
        self.carry_out(actions)

    def tick(self):
        if self.now < self.stalled_until:
            return self.at(self.stalled_until, self.tick)
        self.carry_out(self.machine.tick(self.now))
        self.after(min(0.2, max(0.001, self.machine.due - self.now)), self.tick)

    def carry_out(self, actions):
        numbers = self.machine.numbers
        assert all(new >= old for new, old in zip(numbers, self.numbers, strict=True))
        self.numbers = numbers  # on disk before anything is done
        for action in actions:
            self.tally[type(action).__name__] += 1
            getattr(self, f"do_{type(action).__name__}")(action)
        if self.machine.state in ("SERVING", "DRAINING"):
            assert self.served is not None and self.covers(self.served)
        if self.machine._phase == "run" and not self.machine._stepping and not self.machine._fresh:
            assert self.survivors == set(self.machine._members)  # of every loss, not only of the first

    def covers(self, epoch):
        everything = set(range(self.experts))
        rows = epoch.slots[:, list(epoch.order)].reshape(LAYERS, -1).tolist()
        return all(everything <= set(row) for row in rows)

    def do_StartService(self, action):
        assert action.generation > max(self.services, default=0)
        assert sum(service.alive for service in self.services.values()) <= 1  # the one whose engines run on
        assert list(action.nodes) == sorted(self.machine._workers.keys() & set(action.nodes))
        self.services[action.generation] = service = Service(action.generation, action.nodes)
        if not self.chance(0.05):
            self.after(self.rng.choice((0.05, 0.3)), self.service_up, service)

    def service_up(self, service):
        if service.alive and not service.stopped:
            self.tell(self.event, "service_up", service.generation)

    def do_StopService(self, action):
        service = self.services[action.generation]
        planned = service.alive and not service.reported and action.generation != self.machine.generation
        service.alive = False
        for engine in list(self.engines.values()):
            if engine.generation == service.generation and engine.alive and engine.state != "starting":
                later = [s for s in self.services.values() if s.generation > action.generation]
                replaced = all(engine.rank in s.nodes for s in later)
                assert not (planned and replaced and self.is_current(engine))
                self.after(self.rng.uniform(0.0, 0.1), self.end_engine, engine)

    def is_current(self, engine):
        worker = self.machine._workers.get(engine.rank)
        return worker is not None and worker.incarnation == engine.incarnation

    def do_StartEngine(self, action):
        assert action.incarnation not in self.started and action.incarnation not in self.out
        assert not any(rank == action.rank for rank, _, generation in self.fencing if generation == action.generation)
        service = self.services[action.generation]
        assert action.generation == self.machine.generation == max(self.services)
        assert service.nodes[action.node] == action.rank
        assert action.slots.shape == (LAYERS, self.machine._base.shape[2])
        if action.node == 0 and any(e.node == 0 for e in self.engines.values() if e.generation == action.generation):
            assert self.forgotten
        self.forgotten = False
        self.started.add(action.incarnation)
        self.by_incarnation[action.incarnation] = process = self.streams[action.rank]
        process.newest = action.incarnation
        self.downward(process, self.start_engine, action.incarnation, action.generation, action.node)

    def do_Forget(self, action):
        assert action.generation == self.machine.generation
        self.forgotten = True

    def do_Fence(self, action):
        service = self.services[action.generation]
        assert service.nodes[action.node] == action.rank
        assert service.open  # or it would wait with the others
        self.out.add(action.incarnation)
        key = (action.rank, action.incarnation, action.generation)
        self.fencing.add(key)
        self.after(self.rng.choice((0.002, 0.002, 0.1)), self.fence, service, action, key)

    def fence(self, service, action, key):
        if not service.alive or service.stopped:
            return
        engine = service.came.get(action.node)
        assert engine is None or engine.incarnation <= action.incarnation, "the fence hit a newer engine"
        service.came[action.node] = None
        self.tell(self.fenced, action, key)

    def fenced(self, action, key):
        self.fencing.discard(key)
        self.event("fenced", action.rank, action.incarnation)

    def do_Abort(self, action):
        assert self.announced and action.epoch == self.announced[-1].number
        self.survivors = set(action.ranks)
        for rank, incarnation in zip(action.ranks, action.incarnations, strict=True):
            assert incarnation not in self.out
            self.aborted[incarnation] = action.epoch
            self.downward(self.streams[rank], self.abort, incarnation, action.epoch)

    def do_Persist(self, action):
        epoch = action.epoch
        content = (epoch.generation, epoch.order, epoch.incarnations, epoch.nodes, epoch.slots.tobytes())
        if epoch.number not in self.content:
            assert epoch.number == max(self.content, default=0) + 1
        assert self.content.setdefault(epoch.number, content) == content
        if not self.chance(0.02):
            self.after(self.rng.choice((0.001, 0.01, 0.5 if self.faulty else 0.01)), self.persisted, epoch.number)

    def persisted(self, number):
        self.on_disk.add(number)
        self.tell(self.event, "persisted", number)

    def do_Announce(self, action):
        epoch = action.epoch
        content = (epoch.generation, epoch.order, epoch.incarnations, epoch.nodes, epoch.slots.tobytes())
        assert self.content[epoch.number] == content and epoch.number in self.on_disk
        last = self.announced[-1] if self.announced else None
        assert last is None or epoch.number > last.number
        assert epoch.generation == self.machine.generation == max(self.services)
        assert not any(generation == epoch.generation for _, _, generation in self.fencing)
        assert len(set(epoch.order)) == len(epoch.order) > 0 and self.covers(epoch)
        assert epoch.nodes == tuple(self.services[epoch.generation].nodes.index(r) for r in epoch.order)
        others = [r for r in range(self.rules.num_ranks) if r not in epoch.order]
        assert (epoch.slots[:, others] == -1).all()
        live = {w.rank: w.incarnation for w in self.machine._workers.values()}
        assert tuple(live[r] for r in epoch.order) == epoch.incarnations and not set(epoch.incarnations) & self.out
        seen = self.orders.setdefault(epoch.generation, {}).setdefault(epoch.order, set())
        if self.rules.orders == "sorted":
            assert list(epoch.order) == sorted(epoch.order)
        elif seen & set(epoch.incarnations) and len(epoch.order) > 1:  # only to go on in the same communicator
            assert last and (last.order, last.incarnations) == (epoch.order, epoch.incarnations) and not action.shrink
        seen |= set(epoch.incarnations)
        for incarnation in epoch.incarnations:
            if incarnation in self.told:
                halted = self.aborted.get(incarnation, 0) >= self.told[incarnation]
                assert halted == action.shrink
        self.announced.append(epoch)
        self.arrived[epoch.number], self.has_entered[epoch.number] = set(), set()
        for rank in (*epoch.order, *action.leavers):
            incarnation = live[rank]
            self.told[incarnation] = epoch.number
            self.downward(self.streams[rank], self.announce, incarnation, epoch, action.shrink)
        self.tally["shrinks"] += action.shrink

    def do_Serve(self, action):
        epoch = action.epoch
        assert epoch is self.announced[-1] and self.covers(epoch)
        assert self.has_entered[epoch.number] == set(epoch.incarnations)
        assert not set(epoch.incarnations) & self.out
        self.served = epoch

    def do_Dismiss(self, action):
        self.out.add(action.incarnation)
        self.downward(self.by_incarnation[action.incarnation], self.exit)

    def do_Prefetch(self, action):
        assert action.incarnation not in self.out and action.incarnation in self.announced[-1].incarnations
        self.downward(self.streams[action.rank], self.prefetch, action.incarnation)

    def do_StateChange(self, action):
        self.tally[action.name] += 1
        if action.name in ("RECOVERING", "STARTING"):
            self.served = None

    # A worker

    def launch(self, rank, twice=False):
        if rank in self.gone or (not twice and any(p.alive for p in self.known_of(rank))):
            return
        self.processes[rank] = process = Process(rank)
        self.launched.append(process)
        self.upward(process, self.hello, process)
        self.after(0.3 * self.rng.random(), self.beat, process)

    def known_of(self, rank):
        return [p for p in self.launched if p.rank == rank]

    def beat(self, process):
        if process.alive:
            if not process.stopped:
                engine = process.engine
                self.upward(process, self.heard, process)
                if engine and engine.alive and engine.state == "stepping" and not engine.stopped:
                    engine.steps += self.healthy(engine.epoch)
                    self.say(engine, "progress", engine.steps, self.rng.random() < 0.9)
            self.after(0.3, self.beat, process)

    def end_process(self, process, silent=False):
        if not process.alive:
            return
        self.end_engine(process.engine, quiet=True)
        process.alive = False
        if not silent:
            self.upward(process, self.supervisor_event, process, "lost", "the stream broke")
        self.after(self.rng.choice((0.1, 0.6, 1.4)), self.launch, process.rank)

    def exit(self, process):
        self.end_process(process)

    def end_engine(self, engine, quiet=False):
        if engine is None or not engine.alive:
            return
        engine.alive = False
        if engine.epoch and engine.state in ("stepping", "entering"):
            self.break_mesh(engine.epoch)
        process = engine.process
        if not quiet and process.alive and process.engine is engine:
            if not process.stopped:
                self.upward(process, self.supervisor_event, process, "lost", "the engine ended")
            self.after(0.01, self.end_process, process)

    def start_engine(self, process, incarnation, generation, node):
        self.end_engine(process.engine, quiet=True)
        process.engine = engine = Engine(process, incarnation, generation, node)
        self.engines[incarnation] = engine
        if self.crashing.get(process.rank) == "start":
            self.after(0.1, self.end_engine, engine)
        elif not self.chance(0.02):
            self.after(self.rng.choice((0.05, 0.2, 0.5)), self.connect, engine)

    def connect(self, engine):
        if not engine.alive or self.defer(engine, self.connect, engine):
            return
        self.say(engine, "arrived", 0)
        engine.state = "connecting"
        service = self.services[engine.generation]
        if not service.alive:
            return self.end_engine(engine)
        if service.stopped:
            return self.after(0.2, self.connect, engine)
        service.came[engine.node] = engine
        if service.open:
            self.join(engine)
        elif len(service.came) == len(service.nodes) and all(e.alive for e in service.came.values()):
            service.open = True
            for other in list(service.came.values()):
                self.join(other)

    def defer(self, engine, act, *args):
        """A stopped engine does it later."""
        if engine.stopped or engine.process.stopped:
            self.after(0.3, act, *args)
            return True
        return False

    def join(self, engine):
        engine.state = "loading"
        self.say(engine, "joined", engine.generation)
        slow = 7.0 if self.chance(0.03) else self.rng.choice((0.05, 0.2, 0.8))
        if self.crashing.get(engine.rank) == "load":
            self.after(slow / 2, self.end_engine, engine)
        self.after(slow, self.loaded, engine)

    def loaded(self, engine):
        if engine.alive and not self.defer(engine, self.loaded, engine):
            engine.state = "waiting"
            self.say(engine, "ready", engine.generation)

    def abort(self, process, incarnation, number):
        engine = process.engine
        if engine and engine.alive and engine.incarnation == incarnation:
            if engine.stuck or self.chance(0.04):
                engine.stuck = True
            elif engine.state in ("stepping", "entering", "left") and engine.epoch.number <= number:
                engine.state, engine.next = "waiting", None

    def announce(self, process, incarnation, epoch, shrink):
        engine = process.engine
        if not engine or not engine.alive or engine.incarnation != incarnation or engine.stuck:
            return
        if self.crashing.get(engine.rank) == "enter" and engine.epoch is None:
            return self.after(0.05, self.end_engine, engine)
        if shrink:
            assert engine.state != "stepping"
        if engine.state == "stepping":
            engine.next = epoch
            self.agree(engine.epoch)
        else:
            assert engine.state in ("waiting", "entering")
            self.enter(engine, epoch)

    def healthy(self, epoch, state="stepping"):
        """Whether a collective of all its members comes to an end."""
        engines = [self.engines[i] for i in epoch.incarnations]
        pairs = any(cut <= set(epoch.order) for cut in self.cuts)
        return not pairs and all(
            e.alive and not e.stopped and not e.process.stopped and e.epoch is epoch and e.state == state
            for e in engines
        )

    def agree(self, epoch):
        """The step at whose end all members know of the next epoch is the last."""
        if not self.healthy(epoch):
            return
        engines = [self.engines[i] for i in epoch.incarnations]
        following = engines[0].next
        if following is None or any(e.next is not following for e in engines):
            return
        for engine in engines:
            engine.next = None
            if engine.incarnation in following.incarnations:
                self.enter(engine, following)
            else:
                engine.state = "left"

    def enter(self, engine, epoch):
        engine.state, engine.epoch = "entering", epoch
        self.after(self.rng.choice((0.005, 0.05, 0.3)), self.arrive, engine, epoch)

    def arrive(self, engine, epoch):
        if not engine.alive or engine.epoch is not epoch or engine.state != "entering":
            return
        if self.defer(engine, self.arrive, engine, epoch):
            return
        self.say(engine, "arrived", epoch.number)
        self.arrived[epoch.number].add(engine.incarnation)
        self.barrier(epoch)

    def barrier(self, epoch):
        service = self.services[epoch.generation]
        if self.arrived[epoch.number] == set(epoch.incarnations) and self.healthy(epoch, "entering"):
            engines = [self.engines[i] for i in epoch.incarnations]
            replaced = [(e, came) for e in engines if (came := service.came[e.node]) is not e]
            if replaced:
                # One of the two was shut out and has not heard of it: this one, or one that was so slow to connect that
                # its successor was there before it.
                assert all(e.incarnation in self.out or (c and c.incarnation in self.out) for e, c in replaced)
                return
            if service.alive and not service.stopped:
                for incarnation in epoch.incarnations:
                    self.after(self.rng.choice((0.0, 0.02)), self.in_epoch, self.engines[incarnation], epoch)
            else:
                self.after(0.2, self.barrier, epoch)

    def in_epoch(self, engine, epoch):
        if engine.alive and engine.epoch is epoch and engine.state == "entering":
            engine.state = "stepping"
            self.has_entered[epoch.number].add(engine.incarnation)
            self.say(engine, "entered", epoch.number)
            if engine.next:
                self.agree(epoch)

    def break_mesh(self, epoch):
        """A member is gone: some of the others notice by themselves, the others hang until told."""
        for incarnation in epoch.incarnations:
            engine = self.engines[incarnation]
            if engine.alive and engine.epoch is epoch and self.rng.random() < 0.4:
                self.after(self.rng.choice((0.0, 0.01, 0.2)), self.fail, engine, epoch)

    def fail(self, engine, epoch):
        if engine.alive and engine.epoch is epoch and engine.state in ("stepping", "entering") and not engine.stuck:
            engine.state, engine.next = "waiting", None
            self.say(engine, "failed", epoch.number)

    def prefetch(self, process, incarnation):
        engine = process.engine
        if engine and engine.alive and engine.incarnation == incarnation and not self.chance(0.1):
            self.after(self.rng.choice((0.05, 0.4)), self.say, engine, "prefetched")

    # Faults

    def fault(self):
        rng = self.rng
        kind = rng.choice(FAULTS)
        self.tally[kind] += 1
        living = [p for p in self.processes.values() if p.alive]
        process = rng.choice(living) if living else None
        engine = process.engine if process else None
        ranks = range(self.rules.num_ranks)
        match kind:
            case "kill":
                if process:
                    self.end_process(process, silent=rng.random() < 0.2)
            case "kill engine":
                self.end_engine(engine)
            case "kill two":
                for other in rng.sample(living, min(2, len(living))):
                    self.after(rng.choice((0.0, 0.01, 0.1)), self.end_process, other)
            case "kill host":
                if process:
                    self.kill_host(self.rules.hosts[process.rank])
            case "stop engine":
                if engine:
                    engine.stopped = True
                    self.after(rng.uniform(0.1, 4.0), self.go_on, process, engine)
            case "stop worker":
                if process:
                    process.stopped = True
                    self.after(rng.uniform(0.1, 4.0), self.go_on, process, engine)
            case "cut from the coordinator":
                if process:
                    process.held_until = self.now + rng.uniform(0.1, 3.0)
            case "cut between workers":
                if len(ranks) > 1:
                    self.cuts.add(frozenset(rng.sample(ranks, 2)))
            case "start twice":
                if process:  # its launcher thinks it is dead: two say they are the rank
                    self.launch(process.rank, twice=True)
            case "fail":
                if engine and engine.epoch:
                    self.fail(engine, engine.epoch)
            case "kill service" | "stop service":
                running = [s for s in self.services.values() if s.alive]
                if running:
                    self.lose_service(rng.choice(running), kind == "kill service")
            case "drain":
                self.tell(self.drain, rng.choice(self.rules.hosts))
            case "rebalance":
                self.tell(self.rebalance)
            case "coordinator stands still":
                self.stand_still(rng.uniform(0.3, 3.0))
            case "coordinator dies":
                self.tell(self.restart_coordinator)
            case "rank breaks":
                self.crashing[rng.choice(ranks)] = rng.choice(("start", "load", "enter"))
            case "rank leaves":
                if process:
                    self.gone.add(process.rank)
                    for other in self.known_of(process.rank):
                        self.end_process(other)

    def kill_host(self, host):
        processes = [p for p in self.processes.values() if p.alive and self.rules.hosts[p.rank] == host]
        known = [p for p in processes if p.incarnation is not None]
        for process in processes:
            self.end_process(process, silent=True)
        if known:
            first = known[0]
            self.after(0.01, self.tell, self.event, "lost", first.rank, first.incarnation, "host is gone")
            if len(known) > 1:
                last = known[-1]
                self.after(0.005, self.tell, self.host_lost, last)

    def host_lost(self, process):
        on_host = [r for r, w in self.machine._workers.items() if self.rules.hosts[r] == self.rules.hosts[process.rank]]
        current = self.machine._registered(process.rank, process.incarnation)
        self.carry_out(self.machine.lost(process.rank, process.incarnation, "no route to host", self.now, True))
        assert not current or not set(on_host) & set(self.machine._workers)

    def go_on(self, process, engine):
        """SIGCONT"""
        if engine:
            engine.stopped = False
        if process.stopped:
            process.stopped = False
            inbox, process.inbox = process.inbox, []
            for act, args in inbox:
                self.receive(process, act, *args)
        if engine and engine.epoch:
            self.wake(engine.epoch)

    def wake(self, epoch):
        if epoch.number in self.arrived and epoch is self.announced[-1]:
            self.barrier(epoch)
        self.agree(epoch)

    def lose_service(self, service, killed):
        service.alive, service.stopped = not killed, not killed
        if killed:
            for engine in list(self.engines.values()):
                if engine.generation == service.generation and engine.state != "starting":
                    self.after(self.rng.uniform(0.0, 0.3), self.end_engine, engine)
        else:
            self.after(self.rng.uniform(0.5, 3.0), setattr, service, "stopped", False)
        if killed or self.rng.random() < 0.5:
            service.reported = True
            self.after(self.rng.choice((0.001, 0.1)), self.tell, self.event, "service_lost", service.generation)

    def drain(self, host):
        refused, actions = self.machine.drain(host, self.now)
        assert refused is None or (len(refused) > 20 and not actions)
        self.tally["drains refused"] += refused is not None
        self.carry_out(actions)

    def rebalance(self):
        """Every expert takes the places of another one."""
        epoch, experts = self.machine.epoch, list(range(self.experts))
        if epoch is not None:
            self.rng.shuffle(experts)
            goal = np.array([*experts, -1], np.int32)[epoch.slots]
            refused, actions = self.machine.rebalance(epoch.number, goal, self.now)
            assert refused is None or (len(refused) > 20 and not actions)
            self.tally["rebalances refused"] += refused is not None
            self.carry_out(actions)

    def restart_coordinator(self):
        for service in self.services.values():
            service.alive = False
        for process in list(self.by_incarnation.values()):
            self.end_process(process, silent=True)
        self.fencing.clear()
        self.machine = Membership(self.rules)
        self.machine.restore_from(*self.numbers)

    def end_faults(self):
        """From here on all is well, but for ranks that are gone or broken for good."""
        self.faulty = False
        self.cuts.clear()
        for process in list(self.by_incarnation.values()):
            self.go_on(process, process.engine)
        for service in self.services.values():
            service.stopped = False
        if self.rng.random() < 0.6:
            self.crashing.clear()
        if self.rng.random() < 0.5:
            self.bring_back()
        for epoch in self.announced[-2:]:
            self.wake(epoch)

    def bring_back(self):
        self.gone.clear()
        for rank in range(self.rules.num_ranks):
            self.launch(rank)

    # Progress

    def good(self):
        return set(range(self.rules.num_ranks)) - self.gone - set(self.crashing)

    def settled(self):
        """All good ranks serve, and nothing more is to be done."""
        machine = self.machine
        return (
            machine.state == "SERVING"
            and machine.epoch is not None
            and self.good() <= set(machine.epoch.order)
            and machine._pending is None
            and not machine._entering
            and not machine.moving
        )


FAULTS = [
    *("kill", "kill", "kill", "kill engine", "kill two", "kill host", "stop engine", "stop worker"),
    *("cut from the coordinator", "cut between workers", "start twice", "fail", "kill service", "stop service"),
    *(
        "drain",
        "drain",
        "rebalance",
        "rebalance",
        "coordinator stands still",
        "coordinator dies",
        "rank breaks",
        "rank leaves",
    ),
]


def history(seed, tally):
    """One world: a time of faults, then a time without, in which it must come to serve with all that are well."""
    world = World(seed, tally)
    rng, end = world.rng, world.rng.choice((2.0, 4.0, 8.0))
    if rng.random() < 0.7:
        world.run(6.0, world.settled)
    moment, end = rng.random() * 2, world.now + end
    for _ in range(rng.randrange(9)):
        world.at(world.now + moment, world.fault)
        moment += rng.choice((0.005, 0.05, 0.5, 2.0)) * rng.random()
    world.run(max(end, world.now + moment))
    world.end_faults()
    held = (process.held_until for process in world.by_incarnation.values())
    world.run(max(world.now, world.stalled_until, *held) + 2.5)  # until all that was done is known, a stall, too
    for _ in range(2):
        begun = world.now
        if world.rules.plan(sorted(world.good())) is not None:
            assert world.run(begun + 90.0, world.settled), f"no progress: {world.machine.status()}"
            tally["settled"] += 1
            tally["slowest s"] = max(tally["slowest s"], world.now - begun)
            world.run(world.now + 1.5)
            if not world.crashing:
                assert world.settled()
        else:
            world.run(begun + 8.0)
            if not world.crashing:
                assert world.machine.state == "UNSERVABLE", world.machine.status()
            tally["unservable"] += 1
        if not world.gone:
            break
        world.bring_back()
    tally["generations"] += world.machine.generation
    tally["histories"] += 1
