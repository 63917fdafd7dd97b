"""Everything that is to be known of N GPUs, one rank each: throughput, every loss, what it costs, and dispatch.

    python scripts/bench_four_gpus.py [--hosts 4] [--shape deepseek-v3] [--limit 560] [--out FILE]
    JAX_PLATFORMS=cpu python scripts/bench_four_gpus.py --streams 16 --tokens 60 100 --seconds 2

The parts, in this order; --only takes some of them, --limit leaves out what does not fit into so many seconds:

    dispatch  bench_dispatch.py: all-gather and reduce-scatter against all-to-all
    warm-up   `moe-jax warmup` for all ranks, and for one and two fewer
    faults    one cluster, --streams streams: tokens/s undisturbed; kill -9 and SIGSTOP of each rank in turn, two at
              once, a second one in recovery, the rank that rejoins, another one meanwhile, rank 0 again as it is back;
              the pause of each with its phases, and its rejoin
    losses    another cluster, whose lost ranks stay away: tokens/s on N, N - 1 and N - 2 ranks
    exact     the demo model in float32, deterministic, under the same faults: every token compared

The model has random weights, each expert is on two ranks, and as many layers as fit unless --layers says otherwise; on
a CPU it is the demo. In bfloat16 a GPU rounds a request's products as they are batched, so there its tokens are counted
(lost, repeated), and compared with those of an undisturbed pass to see how many streams diverge and where; a second
undisturbed pass says how many do so anyway. Results are written to --out as they come.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _cluster import (
    START,
    Cluster,
    Job,
    Shape,
    Stream,
    Tally,
    Traffic,
    add_shape_options,
    expected_outputs,
    machine,
    make_jobs,
)
from _cluster import run as in_loop
from _shapes import SHAPES
from bench_recovery import PHASES, throughput
from bench_start import warm_up
from chaos import FAULTS, HANG, Chaos
from rich.console import Console
from rich.table import Table

from moe_jax.config import ConfigError, parse_hugging_face
from moe_jax.llm import engine_config
from serving.environment import guess_platform

PARTS = ("dispatch", "warm-up", "faults", "losses", "exact")
MORE = {  # kinds of chaos.py
    "two at once": "two",
    "another in recovery": "during",
    "again as it rejoins": "joiner",
    "another as it rejoins": "bystander",
    "another at the switch": "switch",
    "rank 0 twice": "zero",
}
STOPPED = 2.5  # seconds; more than a heartbeat's deadline
SLOWEST = 40.0  # seconds that the first fault may take until all ranks are back; later ones: as the slowest before
CLOSE = 10.0  # seconds to end a cluster and to print


@dataclass(frozen=True)
class Clock:
    """How much of --limit is left."""

    limit: float
    begun: float

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.begun)


def layers_that_fit(shape: str, ranks: int, memory: int, **options: Any) -> int:
    """Of a model of this shape with each expert on two ranks. memory: bytes of each device; options: of EngineConfig.

    Raises ConfigError, as the memory planner does, where not one layer fits.
    """
    raw, error = SHAPES[shape], None
    for layers in range(raw["num_hidden_layers"], 0, -1):
        model = parse_hugging_face(raw | {"num_hidden_layers": layers})
        if model.num_moe_layers:
            try:
                engine_config(model, ranks, "gpu", memory, **options | {"replication": min(2, ranks)})
                return layers
            except ConfigError as e:
                error = e
    raise error or ConfigError(f"{shape}: found no layer with experts")


def divergence(undisturbed: Mapping[Job, Sequence[int]], streams: Iterable[Stream]) -> dict[str, Any]:
    """How many streams have another token than the undisturbed one of the same job, and where the first such is."""
    first: list[int | None] = []
    for stream in streams:
        pairs = zip(undisturbed[stream.job], stream.tokens, strict=False)
        first.append(next((i for i, (a, b) in enumerate(pairs) if a != b), None))
    found = [i for i in first if i is not None]
    where = {"least": min(found), "median": statistics.median(found), "most": max(found)} if found else {}
    return {"streams": len(first), "diverged": len(found), "at": where}


def planned(chaos: Chaos, ranks: int) -> list[tuple[str, Callable[[], Awaitable[str]]]]:
    """Name and fault, what matters most first."""

    async def kill(rank: int) -> str:
        return chaos.strike((await chaos.ranks())[rank], "rank")

    async def stop(rank: int) -> str:
        return await chaos.stop((await chaos.ranks())[rank], "engine", STOPPED)

    each: list[tuple[str, Callable[[], Awaitable[str]]]] = []
    for rank in range(ranks):
        each += [("kill -9", lambda rank=rank: kill(rank)), ("SIGSTOP", lambda rank=rank: stop(rank))]
    for name, kind in MORE.items():
        if ranks > 2 or kind in ("joiner", "zero"):  # with two ranks the second loss would be the last one's
            each.append((name, lambda kind=kind: FAULTS[kind](chaos)))
    return each


class Bench:
    """The parts, and what they found."""

    def __init__(self, args: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> None:
        self.args, self.directory, self.say = args, directory, say
        self.clock = Clock(args.limit, time.monotonic())
        self.results: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        self.results |= machine() | {"hosts": args.hosts, "streams": args.streams, "left_out": []}

    def record(self, name: str, found: Any) -> None:
        self.results[name] = found
        if self.args.out is not None:
            self.args.out.write_text(json.dumps(self.results))

    def fits(self, what: str, seconds: float) -> bool:
        if self.clock.left < seconds:
            self.say(f"{what}: left out, {self.clock.left:.0f} s are left")
            self.results["left_out"].append(what)
            return False
        return True

    async def run(self) -> None:
        args, memory = self.args, None
        if "dispatch" in args.only:
            memory = await asyncio.to_thread(self.dispatch)
        shape = self.shape(memory)
        self.record("shape", asdict(shape) | {"layers": args.layers})
        if "warm-up" in args.only and self.fits("warm-up", 60.0):
            lose = min(2, shape.hosts - 1)
            cache = Path(os.environ.get("MOE_JAX_CACHE") or "~/.cache/moe-jax/xla")
            options = replace(shape, hosts=1).arguments()[2:]  # behind --hosts 1
            found = await asyncio.to_thread(warm_up, shape.hosts, lose, cache.expanduser(), options)
            self.record("warm-up", found)
            self.say("{entries} programs, {megabytes} MB, {seconds} s".format(**found))
        if "faults" in args.only and self.fits("faults", 90.0):
            await self.faults(shape)
        if "losses" in args.only and self.fits("losses", 60.0 + 8 * args.seconds):
            await self.losses(shape)
        if "exact" in args.only and self.fits("exact", 90.0):
            await self.exact()

    # The parts

    def dispatch(self) -> int | None:
        """The bytes that JAX has on each device, where that is known. In a process of its own, which ends."""
        command = [sys.executable, str(Path(__file__).parent / "bench_dispatch.py"), "--json"]
        command += ["--devices", str(self.args.hosts), *self.args.dispatch.split()]
        rows: list[dict[str, Any]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                rows.append(json.loads(line))
                self.say(f"dispatch: {line.strip()}")
                self.record("dispatch", rows)
                if self.clock.left < 0.7 * self.clock.limit:
                    self.say("dispatch: the rest is left out, a third of the time is over")
                    child.kill()
        if not rows:
            raise RuntimeError(f"bench_dispatch.py ended with {child.returncode}; --only and --layers go on without it")
        return rows[0]["memory"]

    def shape(self, memory: int | None) -> Shape:
        """memory: of a device."""
        args = self.args
        fewest = max(1, args.hosts - 2)  # ranks that all streams must fit on
        args.max_batch = args.max_batch or -(-args.streams // (16 * fewest)) * 16
        args.max_model_len = args.max_model_len or 512
        args.max_prefill_rows = args.max_prefill_rows or (128 if args.shape == "demo" else 2048)
        names = ("max_batch", "max_model_len", "max_prefill_rows", "num_pages")
        if args.shape != "demo" and args.layers is None and memory is not None:
            args.layers = layers_that_fit(
                args.shape, args.hosts, memory, **{name: getattr(args, name) for name in names}
            )
            self.say(f"{args.shape}: {args.layers} layers fit {memory >> 30} GiB, each expert on two of {args.hosts}")
        return Shape.of(args, self.directory)

    async def faults(self, shape: Shape) -> None:
        """One after the other, as long as time is left."""
        args = self.args
        jobs = make_jobs(args.streams, args.seed, *args.tokens)
        expected = await asyncio.to_thread(expected_outputs, jobs, shape)
        found: dict[str, Any] = {"events": []}
        async with Cluster(shape, self.directory / "faults") as cluster:
            await cluster.until(lambda s: s["survivable_without_compiling"] > 0, START, "programs of smaller meshes")
            devices = sorted({rank["device"] for rank in (await cluster.status())["ranks"]})
            found["devices"] = devices
            passes: list[list[Stream]] = []

            def traffic_of(streams: list[Stream], name: str, once: bool = False) -> Traffic:
                ended = streams.append
                return Traffic(cluster.address, jobs, expected, args.streams, HANG, once=once, ended=ended, name=name)

            for number in (1, 2):
                passes.append([])
                traffic = traffic_of(passes[-1], f"pass-{number}", once=True)
                begun = time.monotonic()
                traffic.start()
                await traffic.stop()
                rate = traffic.tally.tokens / (time.monotonic() - begun)
                self.say(f"undisturbed pass {number}: {len(passes[-1])} streams, {rate:.0f} tokens/s, the last alone")
            undisturbed = {stream.job: stream.tokens for stream in passes[0]}
            found["undisturbed"] = divergence(undisturbed, passes[1])
            streams: list[Stream] = []
            traffic = traffic_of(streams, "stream")
            traffic.start()
            await asyncio.sleep(2.0)
            found["tokens_per_second"] = round(await traffic.rate(args.seconds), 1)
            self.say(f"{shape.ranks} ranks: {found['tokens_per_second']:.0f} tokens/s")
            await self.break_it(Chaos(cluster, traffic, args.seed), shape.ranks, found, "faults")
            await traffic.stop()
            found |= {"tally": asdict(traffic.tally), "disturbed": divergence(undisturbed, streams)}
            self.record("faults", found)

    async def break_it(self, chaos: Chaos, ranks: int, found: dict[str, Any], part: str) -> None:
        slowest = SLOWEST
        for name, fault in planned(chaos, ranks):
            if not self.fits(f"{part}: {name}", 1.3 * slowest + CLOSE):
                return
            begun = time.monotonic()
            event = await chaos.inject(name, fault)
            took = time.monotonic() - begun
            slowest = took if len(chaos.events) == 1 else max(slowest, took)
            new = [r for r in (await chaos.cluster.status())["recoveries"] if r["epoch"] > event.epochs[0]]
            phases = {
                kind: [{p: r.get(f"{p}_ms") for p in PHASES} for r in new if r[kind]] for kind in ("lost", "joined")
            }
            found["events"].append(asdict(event) | phases)
            self.say("  ".join(event.row()))
            self.record(part, found)
            if not event.recovered:
                self.say(chaos.cluster.log_tail())
                return

    async def losses(self, shape: Shape) -> None:
        args = self.args
        async with Cluster(shape, self.directory / "losses", restart=False) as cluster:
            traffic = Traffic(cluster.address, make_jobs(args.streams, args.seed, *args.tokens), {}, args.streams, HANG)
            traffic.start()
            await asyncio.sleep(3.0)
            rows = await throughput(cluster, traffic, min(2, shape.hosts - 1), args.seconds, self.say)
            await traffic.stop()
            self.record("losses", {"throughput": rows, "tally": asdict(traffic.tally)})

    async def exact(self) -> None:
        args = self.args
        fewer = Shape(args.hosts, replication=2, max_batch=16, max_model_len=512, num_pages=160)
        shape = replace(fewer, dtype="float32", deterministic=True)
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # or a GPU takes tf32 for float32
        width = min(32, args.streams)
        jobs = make_jobs(width, args.seed, *args.tokens)
        expected = await asyncio.to_thread(expected_outputs, jobs, shape)
        found: dict[str, Any] = {"events": [], "streams": width}
        async with Cluster(shape, self.directory / "exact") as cluster:
            traffic = Traffic(cluster.address, jobs, expected, width, HANG)
            traffic.start()
            await asyncio.sleep(2.0)
            await self.break_it(Chaos(cluster, traffic, args.seed), shape.ranks, found, "exact")
            await traffic.stop()
            self.record("exact", found | {"tally": asdict(traffic.tally)})


def show(console: Console, r: dict[str, Any]) -> None:
    console.print(f"{r['cpu']}, {r['cores']} cores; {r['date']}; jax {r['jax']}; {r['hosts']} hosts", soft_wrap=True)
    show_dispatch(console, r.get("dispatch", [])[1:])
    for part in ("faults", "exact"):
        if part in r:
            show_faults(console, part, r[part])
    if "faults" in r:
        console.print(f"undisturbed: {r['faults']['tokens_per_second']} tokens/s, {r['streams']} streams")
    for row in r.get("losses", {}).get("throughput", []):
        console.print("{when}: {tokens_per_second} tokens/s".format(**row))
    if r["left_out"]:
        console.print(f"left out for lack of time: {', '.join(r['left_out'])}")


def show_dispatch(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("tokens", "hidden", "experts", "gather_us", "all_to_all_us", "ratio", "gather_mb", "all_to_all_mb")
    titles = (
        "tokens a rank",
        "hidden",
        "experts",
        "gather, us",
        "all-to-all, us",
        "ratio",
        "gather, MB",
        "all-to-all, MB",
    )
    table = Table(*titles, title="dispatch and combine; MB that a rank sends")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    if rows:
        console.print(table)


def show_faults(console: Console, part: str, found: dict[str, Any]) -> None:
    title = f"{part}, ms: the longest gap in any stream, the longest of each phase in the epochs after a loss"
    table = Table("fault", "what", "pause", *PHASES[:-1], "rejoin", "whole, s", title=title)
    for event in found["events"]:
        phases = (max((e[p] for e in event["lost"] if e[p] is not None), default=None) for p in PHASES[:-1])
        cells = [event["pause_ms"], *phases, event["rejoin_ms"], event["whole_s"]]
        table.add_row(event["fault"], event["what"], *map(_cell, cells))
    console.print(table)
    if "tally" in found:
        console.print(f"{part}: {Tally(**found['tally'])}")
    for name in ("undisturbed", "disturbed"):
        if name in found:
            text = "{diverged} of {streams} {name} streams differ from the first pass".format(name=name, **found[name])
            where = ", ".join(f"{what} {i:g}" for what, i in found[name]["at"].items())
            console.print(f"{text}, the first token that does: {where}" if where else text)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def clean(results: dict[str, Any]) -> bool:
    """No token lost or repeated, none changed where they are comparable, no stream broken, all ranks back."""
    parts = [results[part] for part in ("faults", "losses", "exact") if part in results]
    tallies = [Tally(**part["tally"]) for part in parts if "tally" in part]
    events = [event for part in parts for event in part.get("events", [])]
    return all(tally.clean for tally in tallies) and all(e["recovered"] for e in events)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_options(parser, hosts=4)
    parser.set_defaults(shape=None, replication=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(100, 200), metavar=("MIN", "MAX"), help="of each stream"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of tokens per second")
    parser.add_argument("--dispatch", default="", metavar="OPTIONS", help="of bench_dispatch.py, in one word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S", help="begin nothing that takes longer")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and journals there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON there, after each result")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    args = parser.parse_args()
    if args.shape is None:
        on_cpu = guess_platform(os.environ.get("JAX_PLATFORMS")) == "cpu"
        args.shape = "demo" if on_cpu else "deepseek-v3"
    if args.shape != "demo" and args.layers is None and "dispatch" not in args.only:
        parser.error("--layers: found none, expected how many fit, which only the dispatch part could find out")
    if args.hosts < 2:
        parser.error(f"--hosts: found {args.hosts}, expected at least 2")
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} {text}", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="bench-four-gpus-")
        bench = Bench(args, args.logs or Path(stack.enter_context(temporary)), say)
        in_loop(bench.run())
    show(Console(width=None if sys.stdout.isatty() else 160), bench.results)
    if args.json:
        print(json.dumps(bench.results))
    return 0 if clean(bench.results) else 1


if __name__ == "__main__":
    sys.exit(main())
