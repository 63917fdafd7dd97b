"""Break a cluster in every way at hand while clients stream from it, and look whether they notice.

    python scripts/chaos.py --hosts 6 --faults 100 --seed 1
    python scripts/chaos.py --hosts 4 --sweep pairs [--ranks-per-host 2]

Starts `moe-jax serve` with the demo model and keeps 32 streams running through its public API. Every stream is compared
token by token with what one host gives in a process of its own, computed before. Between two faults the cluster becomes
whole again. Exit code 1 if a token was lost, duplicated or changed, if a stream hung or saw an error, if an expert was
missing while requests were served, or if the cluster did not become whole. Whether memory and threads of its processes
stay flat is printed, and decides nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from _cluster import (
    Cluster,
    Resources,
    Shape,
    Tally,
    Traffic,
    add_shape_options,
    expected_outputs,
    is_alive,
    is_whole,
    make_jobs,
    send,
    summary,
    worker_command,
)
from _cluster import run as in_loop
from _growth import DEFINITION, Growth, by_age, by_process, medians, with_age
from rich.console import Console
from rich.table import Table

WHOLE = 120.0  # seconds that a cluster may take to become whole again
HANG = 150.0  # seconds without a token: longer than that, for a stream may have to wait for ranks to return
GONE = 10.0  # seconds that a fenced process may live on after it woke up
CUT = 3.0  # seconds that a network is cut


class Proxy:
    """Between workers and the coordinator: passes bytes on, unless it is `cut`, when it swallows nothing and passes
    nothing, like a cable that was pulled."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])

    def cut(self, cut: bool) -> None:
        if cut:
            self._open.clear()
        else:
            self._open.set()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            onward, back = await asyncio.open_connection(*self._target)
        except OSError:
            return writer.close()
        for a, b in ((reader, back), (onward, writer)):
            task = asyncio.create_task(self._pump(a, b))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            await self._open.wait()
            writer.close()


class Distant:
    """The workers of one host, reached by way of a proxy, and started again here when they end."""

    def __init__(self, cluster: Cluster, host: str, ranks: Sequence[int]) -> None:
        self._cluster, self.host, self._ranks = cluster, host, ranks
        self.proxy = Proxy(cluster.address)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """The host is drained first, so that the launcher leaves it alone."""
        await self.proxy.start()
        await self._cluster.drain(self.host)
        self._tasks = [asyncio.create_task(self._keep(rank)) for rank in self._ranks]
        await self._cluster.until(is_whole, WHOLE, f"{self.host} was drained and starts again behind a proxy")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.proxy.close()

    async def _keep(self, rank: int) -> None:
        with (self._cluster.directory / f"rank{rank}.log").open("ab") as log:
            while True:
                command = worker_command(self.proxy.address, rank, self.host)
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
                try:
                    await process.wait()
                except asyncio.CancelledError:
                    process.terminate()
                    raise
                await asyncio.sleep(0.1)


@dataclass
class Event:
    """A fault and what followed. Times are milliseconds; None: nothing to measure."""

    number: int
    fault: str
    what: str = ""
    recovered: bool = False
    pause_ms: float | None = None  # the longest gap in any stream until those that are left serve again
    rejoin_ms: float | None = None  # and after that until all are back
    whole_s: float | None = None  # seconds from the fault until all ranks serve
    epochs: list[int] = field(default_factory=list)  # before, and after
    compilations: int = 0
    missing: int = 0  # experts, while requests were served
    unservable: bool = False  # was it, for a time
    problems: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        def ms(value: float | None) -> str:
            return "–" if value is None else f"{value:.0f}"

        recovered = "no" if not self.recovered else "yes, was UNSERVABLE" if self.unservable else "yes"
        epochs = "–" if not self.epochs else f"{self.epochs[0]} → {self.epochs[-1]}"
        whole = "–" if self.whole_s is None else f"{self.whole_s:.1f}"
        return [
            *(str(self.number), self.fault, self.what, recovered, ms(self.pause_ms), ms(self.rejoin_ms), whole),
            *(epochs, str(self.compilations), str(self.missing)),
        ]


class Chaos:
    """Injects faults, one after the other, and watches."""

    def __init__(self, cluster: Cluster, traffic: Traffic, seed: int) -> None:
        self.cluster, self.traffic, self.random = cluster, traffic, random.Random(seed)
        self.distant: Distant | None = None
        self.events: list[Event] = []
        self.resources: dict[int, dict[str, Resources]] = {}  # after so many faults
        self.stopped: set[int] = set()  # processes that shall end once they wake up

    # What a fault needs

    async def ranks(self) -> list[dict[str, Any]]:
        return (await self.cluster.status())["ranks"]

    async def victims(self, count: int) -> list[dict[str, Any]]:
        return self.random.sample(await self.ranks(), count)

    def strike(self, rank: dict[str, Any], kind: str) -> str:
        """kill -9 to a rank's engine or supervisor ("worker"), or to all of both ("rank")."""
        pids = {"engine": ["pid"], "worker": ["supervisor_pid"], "rank": ["supervisor_pid", "pid"]}[kind]
        send([rank[name] for name in pids], signal.SIGKILL)
        return f"{kind} {rank['rank']}"

    async def strike_host(self, host: str) -> str:
        for rank in [r for r in await self.ranks() if r["host"] == host]:
            self.strike(rank, "rank")
        return host

    def kind(self) -> str:
        return self.random.choice(["engine", "worker", "rank"])

    async def whole(self, what: str) -> dict[str, Any]:
        return await self.cluster.until(is_whole, WHOLE, what)

    # One event

    async def inject(self, name: str, fault: Callable[[], Awaitable[str]]) -> Event:
        """`fault` returns what it did, in words."""
        event = Event(len(self.events) + 1, name)
        self.events.append(event)
        status = before = await self.cluster.until_settled(WHOLE, "before the fault")
        await asyncio.sleep(self.random.uniform(0.0, 0.5))
        self.traffic.clear()
        begun, served = time.monotonic(), None
        epoch, incarnations = before["epoch"], _incarnations(before)
        injecting = asyncio.ensure_future(fault())
        try:
            while True:
                status, now = await self.cluster.status(), time.monotonic()
                if status["state"] == "SERVING":
                    if status["epoch"] > epoch and served is None:
                        served = now
                    event.missing = max(event.missing, status["experts"]["missing"])
                event.unservable |= status["state"] == "UNSERVABLE"
                changed = _incarnations(status) != incarnations
                if injecting.done() and is_whole(status) and (changed or now - begun > 5.0):
                    break
                if now - begun > WHOLE:
                    raise TimeoutError(f"not whole after {WHOLE:g} s: {summary(status)}")
                await asyncio.sleep(0.05)
            event.what = injecting.result()
            event.whole_s = round(now - begun, 3)
            event.recovered = True
            async with asyncio.timeout(HANG):
                await self.traffic.all_moved(now)
            event.problems += await self._sleepers()
        except (TimeoutError, OSError) as e:
            event.problems.append(str(e) or "streams do not go on")
        finally:
            if injecting.cancel():
                with contextlib.suppress(BaseException):
                    await injecting
        event.epochs = [epoch, status["epoch"]]
        event.compilations = status["compilations"] - before["compilations"]
        served = served or begun + 5.0
        event.pause_ms = _ms(self.traffic.longest_gap(begun, served))
        event.rejoin_ms = _ms(self.traffic.longest_gap_after(served))
        await self._measure()
        return event

    async def _sleepers(self) -> list[str]:
        """Processes that were stopped, fenced and woken up, and still live."""
        deadline = time.monotonic() + GONE
        while (alive := [pid for pid in self.stopped if is_alive(pid)]) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        self.stopped.clear()
        return [f"process {pid} was stopped, woke up, and lives on" for pid in alive]

    async def _measure(self) -> None:
        found = await self.cluster.processes()
        measured = {role: Resources.of(pid) for role, pid in found.items()}
        self.resources[len(self.events)] = {role: r for role, r in measured.items() if r is not None}

    # Faults

    async def engine(self) -> str:
        """kill -9 to an engine."""
        return self.strike((await self.victims(1))[0], "engine")

    async def worker(self) -> str:
        """kill -9 to a supervisor."""
        return self.strike((await self.victims(1))[0], "worker")

    async def host(self) -> str:
        """kill -9 to all processes of a host."""
        return await self.strike_host((await self.victims(1))[0]["host"])

    async def two(self) -> str:
        """Two ranks at once."""
        return " and ".join([self.strike(rank, self.kind()) for rank in await self.victims(2)])

    async def during(self) -> str:
        """A second one while the first is being recovered from."""
        first, second = await self.victims(2)
        delay = self.random.uniform(0.01, 0.05)
        said = self.strike(first, self.kind())
        await asyncio.sleep(delay)
        return f"{said}, {1e3 * delay:.0f} ms later {self.strike(second, self.kind())}"

    async def joiner(self) -> str:
        """A rank is killed, and once more while it joins."""
        return await self._in_rejoin(lambda returning, other: returning)

    async def bystander(self) -> str:
        """A rank is killed, and another one while it joins."""
        return await self._in_rejoin(lambda returning, other: other)

    async def switch(self) -> str:
        """A rank is killed, and another one when the first is being switched in again."""
        first, second = await self.victims(2)
        kinds = self.kind(), self.kind()
        epoch = (await self.cluster.status())["epoch"]
        said = self.strike(first, kinds[0])

        def switches(status: dict[str, Any]) -> bool:
            return any(r["epoch"] > epoch and first["rank"] in r["joined"] for r in status["recoveries"])

        await self.cluster.until(switches, WHOLE, f"rank {first['rank']} was killed and comes back", 0.002)
        return f"{said}, as it is switched in {self.strike(second, kinds[1])}"

    async def _in_rejoin(self, choose: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> str:
        first, second = await self.victims(2)
        kinds, delay = (self.kind(), self.kind()), self.random.uniform(0.0, 1.5)
        said = self.strike(first, kinds[0])

        def joins(status: dict[str, Any]) -> bool:
            rank = status["ranks"][first["rank"]]
            return rank["state"] == "joining" and rank["pid"] is not None and rank["pid"] != first["pid"]

        await self.cluster.until(joins, WHOLE, f"rank {first['rank']} was killed and comes back")
        await asyncio.sleep(delay)
        ranks = await self.ranks()
        victim = choose(ranks[first["rank"]], ranks[second["rank"]])
        return f"{said}, while it joins {self.strike(victim, kinds[1])}"

    async def zero(self) -> str:
        """Rank 0 is killed, and again as soon as it is back."""
        said = [self.strike((await self.ranks())[0], self.kind())]
        await self.cluster.until(lambda s: s["ranks"][0]["state"] != "live", WHOLE, "rank 0 was killed")
        status = await self.whole("rank 0 was killed")
        said.append(self.strike(status["ranks"][0], self.kind()))
        await self.cluster.until(lambda s: s["ranks"][0]["state"] != "live", WHOLE, "rank 0 was killed again")
        return ", then ".join(said)

    async def stop_engine(self) -> str:
        """SIGSTOP to an engine, SIGCONT later."""
        return await self.stop((await self.victims(1))[0], "engine", self.random.choice((0.2, 0.5, 2.5)))

    async def stop_worker(self) -> str:
        """SIGSTOP to a supervisor, SIGCONT later."""
        return await self.stop((await self.victims(1))[0], "worker", self.random.choice((1.3, 2.0, 4.0)))

    async def stop(self, rank: dict[str, Any], kind: str, delay: float) -> str:
        """SIGSTOP to a rank's engine or supervisor ("worker"), and SIGCONT after so many seconds."""
        pid = rank[{"engine": "pid", "worker": "supervisor_pid"}[kind]]
        send([pid], signal.SIGSTOP)
        self.stopped |= {rank["pid"], rank["supervisor_pid"]}
        await asyncio.sleep(delay)
        send([pid], signal.SIGCONT)
        return f"{kind} {rank['rank']} stopped for {delay:g} s"

    async def service(self) -> str:
        """kill -9 to the JAX service."""
        send([(await self.cluster.status())["service_pid"]], signal.SIGKILL)
        return "JAX service"

    async def stop_service(self) -> str:
        """SIGSTOP to the JAX service, SIGCONT later; nobody is lost for it if that is soon."""
        pid, delay = (await self.cluster.status())["service_pid"], self.random.choice((1.0, 3.0, 8.0))
        send([pid], signal.SIGSTOP)
        await asyncio.sleep(delay)
        send([pid], signal.SIGCONT)
        return f"JAX service stopped for {delay:g} s"

    async def cut(self) -> str:
        """The network between the last host's workers and the coordinator is cut, and mended later."""
        assert self.distant is not None
        self.distant.proxy.cut(True)
        self.stopped |= {r[n] for r in await self.ranks() if r["host"] == self.distant.host for n in _PIDS}
        await asyncio.sleep(CUT)
        self.distant.proxy.cut(False)
        return f"{self.distant.host} cut off for {CUT:g} s"


_PIDS = ("pid", "supervisor_pid")
FAULTS = {
    "engine": Chaos.engine,
    "during": Chaos.during,
    "stop engine": Chaos.stop_engine,
    "host": Chaos.host,
    "two": Chaos.two,
    "joiner": Chaos.joiner,
    "zero": Chaos.zero,
    "cut": Chaos.cut,
    "stop worker": Chaos.stop_worker,
    "bystander": Chaos.bystander,
    "switch": Chaos.switch,
    "worker": Chaos.worker,
    "service": Chaos.service,
    "stop service": Chaos.stop_service,
}


def _incarnations(status: dict[str, Any]) -> list[int]:
    return [rank["incarnation"] for rank in status["ranks"]]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)


def random_faults(chaos: Chaos, names: Sequence[str], count: int) -> Iterator[tuple[str, Callable[[], Awaitable[str]]]]:
    """All kinds equally often, in an order drawn anew each time."""
    drawn: list[str] = []
    for _ in range(count):
        if not drawn:
            drawn = chaos.random.sample(names, len(names))
        name = drawn.pop()
        yield name, lambda name=name: FAULTS[name](chaos)


def sweep(chaos: Chaos, shape: Shape, size: int) -> Iterator[tuple[str, Callable[[], Awaitable[str]]]]:
    """Every set of `size` ranks, each losing its engine; with several ranks a host also every set of hosts."""

    async def ranks(numbers: Sequence[int]) -> str:
        found = await chaos.ranks()
        return " and ".join([chaos.strike(found[number], "engine") for number in numbers])

    async def hosts(names: Sequence[str]) -> str:
        return " and ".join([await chaos.strike_host(name) for name in names])

    for numbers in itertools.combinations(range(shape.ranks), size):
        yield "engine" + "s" * (size > 1), lambda numbers=numbers: ranks(numbers)
    if shape.ranks_per_host > 1:
        for names in itertools.combinations([f"host{i}" for i in range(shape.hosts)], size):
            yield "host" + "s" * (size > 1), lambda names=names: hosts(names)


async def run(args: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    shape = Shape.of(args, directory)
    begun = time.monotonic()
    jobs = make_jobs(args.jobs, args.seed, *args.tokens)
    say(f"{len(jobs)} requests on one host, for comparison; programs for {shape}")
    expected = await asyncio.to_thread(expected_outputs, jobs, shape)
    say(f"starting {shape}; logs are in {directory}")
    async with Cluster(shape, directory) as cluster:
        traffic = Traffic(cluster.address, jobs, expected, args.streams, HANG)
        chaos = Chaos(cluster, traffic, args.seed)
        traffic.start()
        rate = await traffic.rate(args.quiet)
        say(f"{rate:.0f} tokens/s undisturbed")
        if args.sweep:
            faults = sweep(chaos, shape, {"single": 1, "pairs": 2}[args.sweep])
        else:
            if "cut" in args.kinds:
                host = f"host{shape.hosts - 1}"
                chaos.distant = Distant(cluster, host, range(shape.ranks - shape.ranks_per_host, shape.ranks))
                await chaos.distant.start()
            faults = random_faults(chaos, args.kinds, args.faults)
        try:
            for name, fault in faults:
                if time.monotonic() - begun > args.limit:
                    break
                event = await chaos.inject(name, fault)
                say("  ".join(event.row()))
                for problem in event.problems:
                    say(f"    {problem}")
                if not event.recovered:
                    say(cluster.log_tail())
                    break
            say(f"{traffic.tally} so far; waiting for the last streams")
            await traffic.stop()
            status = await cluster.status()
        finally:
            if chaos.distant is not None:
                await chaos.distant.close()
    tally = traffic.tally
    ok = tally.clean and all(e.recovered and not e.problems and not e.missing for e in chaos.events)
    processes, ages = by_process(chaos.resources), by_age(chaos.resources)
    aged = with_age(ages)
    grown = [*processes.values(), *([] if aged is None else [aged])]
    return {
        "ok": ok,
        "shape": asdict(shape),
        "seed": args.seed,
        "streams": args.streams,
        "tokens_per_second": round(rate, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "tally": asdict(tally),
        "faults": [asdict(event) for event in chaos.events],
        "resources": {
            "measured": {n: {role: asdict(r) for role, r in found.items()} for n, found in chaos.resources.items()},
            "processes": {role: asdict(growth) for role, growth in processes.items()},
            "ages": [[least, most, len(found), asdict(medians(found))] for (least, most), found in ages.items()],
            "aged": None if aged is None else asdict(aged),
            "flat": all(growth.flat for growth in grown) if processes else None,
        },
        "recoveries": status["recoveries"],
        "requests": status["requests"],
    }


def show(console: Console, result: dict[str, Any]) -> None:
    titles = ("", "fault", "what", "recovered", "pause ms", "rejoin ms", "whole s", "epochs", "compiled", "missing")
    table = Table(*titles, title="Pauses are the longest gap in any stream, as its client saw it")
    for fault in result["faults"]:
        table.add_row(*Event(**fault).row())
    console.print(table)
    show_resources(console, result["resources"])
    tally = Tally(**result["tally"])
    console.print(f"{tally} in {result['seconds']:.0f} s", style="green" if result["ok"] else "bold red")
    for detail in tally.details:
        console.print(detail, markup=False)


def show_resources(console: Console, resources: dict[str, Any]) -> None:
    amounts = ("memory MiB", "threads", "sockets")
    if resources["processes"]:
        table = Table("process", *amounts, "flat", title="Medians early and late, and the most", caption=DEFINITION)
        for role, growth in resources["processes"].items():
            table.add_row(role, *Growth.of(growth).row())
        if resources["aged"] is not None:
            table.add_section()
            table.add_row("engines, the young and the old", *Growth.of(resources["aged"]).row())
        console.print(table)
    if resources["ages"]:
        table = Table("faults lived through", "measurements", *amounts, title="Engines by age, medians")
        for least, most, count, found in resources["ages"]:
            table.add_row(f"{least} to {most}", str(count), *(f"{value:.0f}" for value in found.values()))
        console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Break a cluster while clients stream from it, and look whether they notice.", allow_abbrev=False
    )
    add_shape_options(parser, hosts=4)
    parser.add_argument("--faults", type=int, default=10, help="random ones, with the cluster whole in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="KIND", help=", ".join(FAULTS)
    )
    parser.add_argument(
        "--sweep", choices=("single", "pairs"), help="every victim, or every pair, instead of random ones"
    )
    parser.add_argument("--streams", type=int, default=32, help="at any time")
    parser.add_argument("--jobs", type=int, default=64, help="different requests; half are greedy, half are sampled")
    parser.add_argument("--tokens", type=int, nargs=2, default=(100, 200), metavar=("MIN", "MAX"), help="of each")
    parser.add_argument("--quiet", type=float, default=5.0, metavar="S", help="seconds before the first fault")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S", help="no further fault after so long")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and journal there")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of tables")
    return parser.parse_args()


def main() -> int:
    args = parse()
    with contextlib.ExitStack() as stack:
        directory = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        begun = time.monotonic()

        def say(text: str) -> None:
            print(f"{time.monotonic() - begun:6.1f} {text}", file=sys.stderr, flush=True)

        result = in_loop(run(args, directory, say))
    if args.json:
        print(json.dumps(result))
    else:
        show(Console(width=None if sys.stdout.isatty() else 140), result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
