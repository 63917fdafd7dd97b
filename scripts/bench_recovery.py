"""How long clients wait when a host is killed, against starting the same cluster again.

    python scripts/bench_recovery.py [--hosts 6 --kills 30] [--json]
    python scripts/bench_recovery.py --hosts 2 --shape qwen3-30b-a3b --kills 6 --signal both --streams 64 --losses 0

One run, 32 streams all the time: hosts are killed one after the other (kill -9), each after the one before has come
back; then everything is killed at once and started again with the same requests. A second cluster, whose lost hosts
stay away until they are let back, shows what a loss costs in tokens per second.

A pause is the longest gap between two tokens of any stream that its client saw. The phases are what status says.

--shape takes one of bench_serving.py's models with random weights instead of the demo. Tokens are counted, and compared
with an undisturbed run's where each request has the same bits in any batch: of the demo on a CPU, or --deterministic.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _cluster import (
    START,
    Cluster,
    Resources,
    Shape,
    Tally,
    Traffic,
    add_shape_options,
    expected_outputs,
    is_whole,
    machine,
    make_jobs,
    send,
    worker_command,
)
from _cluster import run as in_loop
from rich.console import Console
from rich.table import Table

PHASES = ("detect", "fence", "agree", "fail", "load", "compile", "rebuild", "first_step", "resume", "pause")
WHOLE = 120.0  # seconds that a host may take to come back
HANG = 300.0  # seconds without a token; a restart of everything must fit
RESTORED = 10.0  # seconds that restoring redundancy may take
BEFORE = 1.0  # seconds before a kill at which its timeline begins
AFTER = 1.5  # seconds that a host is back before its return is over: programs run for the first time there
WINDOW = 0.05  # seconds; of a timeline


async def kill_host(cluster: Cluster, host: str, number: int = signal.SIGKILL) -> None:
    """SIGSTOP is for the engines: what looks after them goes on."""
    ranks = [r for r in (await cluster.status())["ranks"] if r["host"] == host]
    names = ("supervisor_pid", "pid") if number == signal.SIGKILL else ("pid",)
    send([r[name] for r in ranks for name in names], number)


async def kill_and_return(cluster: Cluster, traffic: Traffic, host: str, number: int) -> dict[str, Any]:
    """How long clients waited for the survivors, and for the host that came back; with the records of the status."""
    before = await cluster.until_settled(WHOLE, "before the kill")
    traffic.clear()
    await asyncio.sleep(BEFORE)
    begun = time.monotonic()
    await kill_host(cluster, host, number)
    epoch = before["epoch"]
    await cluster.until(lambda s: s["state"] == "SERVING" and s["epoch"] > epoch, WHOLE, f"{host} was killed")
    served = time.monotonic()
    status = await cluster.until(is_whole, WHOLE, f"{host} was killed and comes back")
    back = time.monotonic()
    await traffic.all_moved(back)
    await asyncio.sleep(AFTER)
    new = [r for r in status["recoveries"] if r["epoch"] > epoch]
    return {
        "host": host,
        "signal": signal.Signals(number).name,
        "pause_ms": _ms(traffic.longest_gap(begun, served)),
        "rejoin_ms": _ms(traffic.longest_gap_after(served)),
        "back_s": round(back - begun, 2),
        "losses": [r for r in new if r["lost"]],
        "joins": [r for r in new if r["joined"]],
        "compilations": status["compilations"] - before["compilations"],
        "tokens_per_second": traffic.timeline(begun - BEFORE, time.monotonic(), WINDOW),
    }


async def restart(cluster: Cluster, traffic: Traffic) -> float:
    """Kill everything and start it again; its clients ask again. Milliseconds without a token."""
    await cluster.until_settled(WHOLE, "before the restart")
    await cluster.kill()
    last = traffic.last
    await cluster.start()
    while traffic.last == last:
        await asyncio.sleep(0.001)
    return round(1e3 * (traffic.last - last), 1)


async def throughput(
    cluster: Cluster, traffic: Traffic, losses: int, seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Tokens per second: before, after each loss, once its redundancy is restored, and with all hosts back."""
    rows: list[dict[str, Any]] = []

    async def measure(when: str) -> None:
        rows.append({"when": when, "tokens_per_second": round(await traffic.rate(seconds), 1)})
        say("{when}: {tokens_per_second} tokens/s".format(**rows[-1]))

    hosts = [f"host{cluster.shape.hosts - 1 - i}" for i in range(losses)]
    await measure("before")
    for i, host in enumerate(hosts, 1):
        before = await cluster.status()
        await kill_host(cluster, host)
        await cluster.until(lambda s, b=before: s["state"] == "SERVING" and s["epoch"] > b["epoch"], WHOLE, "a loss")
        await measure(f"{i} lost, right after")
        await _settled(cluster)
        await measure(f"{i} lost, redundancy restored")
    with contextlib.ExitStack() as stack:
        for rank in (await cluster.status())["ranks"]:
            if rank["host"] in hosts:
                command = worker_command(cluster.address, rank["rank"], rank["host"])
                worker = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
                stack.callback(worker.terminate)
        await cluster.until(is_whole, WHOLE, f"{' and '.join(hosts)} come back")
        await _settled(cluster)
        await measure(f"all {cluster.shape.hosts} back")
    return rows


async def _settled(cluster: Cluster) -> None:
    """Until the epoch has not changed for a while."""
    epoch, since, begun = -1, 0.0, time.monotonic()
    while time.monotonic() - since < 2.0 and time.monotonic() - begun < RESTORED:
        status = await cluster.status()
        if status["epoch"] != epoch:
            epoch, since = status["epoch"], time.monotonic()
        await asyncio.sleep(0.1)


async def kill_in_turn(
    args: argparse.Namespace, cluster: Cluster, traffic: Traffic, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
    """What became of each kill, and memory before the first and after each."""
    draw = random.Random(args.seed)
    kill_or_stop = {"kill": [signal.SIGKILL], "stop": [signal.SIGSTOP], "both": [signal.SIGKILL, signal.SIGSTOP]}
    numbers = kill_or_stop[args.signal]
    kills, memory, begun = [], [await resident(cluster)], time.monotonic()
    for i in range(args.kills):
        if time.monotonic() - begun > args.limit:
            break
        if args.idle:
            await cluster.until_settled(WHOLE, "before an idle moment")
            await traffic.rest(args.idle)
        await asyncio.sleep(draw.uniform(0.0, 0.5))
        host = f"host{draw.randrange(cluster.shape.hosts)}"
        kill = await kill_and_return(cluster, traffic, host, numbers[i % len(numbers)])
        kills.append(kill)
        what = "{host}, {signal}, {pause_ms} ms; back after {back_s} s, {rejoin_ms} ms".format(**kill)
        phases = ", ".join(f"{p} {loss[f'{p}_ms']}" for loss in kill["losses"] for p in PHASES)
        say(f"{i + 1}: {what} ({phases})")
        memory.append(await resident(cluster))
    return kills, memory


async def run(args: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    shape = Shape.of(args, directory)
    jobs = make_jobs(64, args.seed)
    say(f"what {len(jobs)} requests give on one host; programs for {shape}")
    expected = await asyncio.to_thread(expected_outputs, jobs, shape)
    kills: list[dict[str, Any]] = []
    memory: list[dict[str, int]] = []
    rows: list[dict[str, Any]] = []
    tallies, devices, restarted = [], set[str](), None
    say(f"starting {shape}; logs are in {directory}")

    @contextlib.asynccontextmanager
    async def serving(name: str, restart: bool) -> AsyncIterator[tuple[Cluster, Traffic]]:
        async with Cluster(shape, directory / name, restart=restart) as cluster:
            await cluster.until(lambda s: s["survivable_without_compiling"] > 0, START, "programs of smaller meshes")
            traffic = Traffic(cluster.address, jobs, expected, args.streams, HANG, retry=restart)
            traffic.start()
            devices.update(rank["device"] for rank in (await cluster.status())["ranks"])
            await asyncio.sleep(5.0)
            yield cluster, traffic
            await traffic.stop()
            tallies.append(traffic.tally)

    if args.kills:
        async with serving("kills", restart=True) as (cluster, traffic):
            kills, memory = await kill_in_turn(args, cluster, traffic, say)
            restarted = await restart(cluster, traffic)
            say(f"everything started again: {restarted} ms")
    if args.losses:
        async with serving("losses", restart=False) as (cluster, traffic):
            rows = await throughput(cluster, traffic, args.losses, args.seconds, say)
    pauses = [k["pause_ms"] for k in kills if k["pause_ms"] is not None]
    rejoins = [k["rejoin_ms"] for k in kills if k["rejoin_ms"] is not None]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
        "devices": sorted(devices),
        "shape": asdict(shape),
        "streams": args.streams,
        "signal": args.signal,
        "idle_s": args.idle,
        "kills": len(kills),
        "pause_ms": _spread(pauses),
        "rejoin_ms": _spread(rejoins),
        "back_s": _spread([k["back_s"] for k in kills]),
        "phases_ms": {
            name: {p: _median(r.get(f"{p}_ms") for k in kills for r in k[name]) for p in PHASES}
            for name in ("losses", "joins")
        },
        "compilations": sum(k["compilations"] for k in kills),
        "memory_mib": {"before": memory[0], "after": memory[-1]} if memory else None,
        "restart_ms": restarted,
        "ratio": round(restarted / statistics.median(pauses), 1) if restarted and pauses else None,
        "throughput": rows,
        "tallies": [asdict(tally) for tally in tallies],
        "clean": all(tally.clean for tally in tallies),
        "each": [{k: v for k, v in kill.items() if k not in ("losses", "joins")} for kill in kills],
    }


async def resident(cluster: Cluster) -> dict[str, int]:
    """MiB of memory by role: of the coordinator, and of the engine that has most."""
    found = {role: Resources.of(pid) for role, pid in (await cluster.processes()).items()}
    engines = [r.memory for role, r in found.items() if r is not None and role.startswith("engine")]
    coordinator = found["coordinator"]
    return {"coordinator": coordinator.memory if coordinator else 0, "largest engine": max(engines, default=0)}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)


def _median(values: Any) -> float | None:
    found = [v for v in values if v is not None]
    return round(statistics.median(found), 1) if found else None


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "worst": max(values)} if values else {}


def show(console: Console, r: dict[str, Any]) -> None:
    shape = Shape(**r["shape"])
    where = f"{r['cpu']}, {r['cores']} cores; {', '.join(r['devices'])}; {r['date']}; jax {r['jax']}"
    console.print(where, highlight=False, soft_wrap=True)
    idle = f", each after {r['idle_s']:g} s without streams" if r["idle_s"] else ""
    table = Table("", "median", "worst", title=f"{shape}, {r['streams']} streams, {r['kills']} kills{idle}")
    if r["kills"]:
        for name, title in (
            ("pause_ms", "pause, ms"),
            ("rejoin_ms", "pause when it returns, ms"),
            ("back_s", "back, s"),
        ):
            table.add_row(title, *(str(r[name].get(column, "–")) for column in ("median", "worst")))
        table.add_section()
        for phase in PHASES:
            loss, join = (r["phases_ms"][name][phase] for name in ("losses", "joins"))
            table.add_row(f"{phase}, ms (of a join)", f"{loss} ({join})", "")
        table.add_section()
        table.add_row("restart of everything, ms", str(r["restart_ms"]), "")
        table.add_row("as many times the pause", str(r["ratio"]), "")
    for row in r["throughput"]:
        table.add_row(f"tokens/s, {row['when']}", str(row["tokens_per_second"]), "")
    console.print(table)
    for tally in r["tallies"]:
        console.print(str(Tally(**tally)))
        for detail in tally["details"]:
            console.print(detail, markup=False)
    console.print(f"{r['compilations']} programs had to be compiled before it could go on")
    if r["memory_mib"] is not None:
        before, after = r["memory_mib"]["before"], r["memory_mib"]["after"]
        changes = (f"{role} {before[role]} → {now}" for role, now in after.items())
        console.print(f"MiB of memory before and after the kills: {', '.join(changes)}")


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second around the first kill by each signal."""
    from matplotlib.figure import Figure

    first = {kill["signal"]: kill for kill in reversed(result["each"])}
    figure = Figure(figsize=(9, 3 * len(first)), layout="constrained")
    for axes, (name, kill) in zip(figure.subplots(len(first), squeeze=False)[:, 0], sorted(first.items()), strict=True):
        rates = kill["tokens_per_second"]
        axes.step([i * WINDOW - BEFORE for i in range(len(rates))], rates, where="post", linewidth=0.8)
        axes.axvline(0, color="red", linewidth=0.8)
        axes.axvline(kill["back_s"], color="green", linewidth=0.8)
        axes.set(title=f"{name} to {kill['host']} (red): pause {kill['pause_ms']:.0f} ms; back (green)", ylim=(0, None))
        axes.set(ylabel=f"tokens/s, each {1e3 * WINDOW:.0f} ms", xlabel="seconds", xlim=(-BEFORE, None))
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="How long clients wait when a host is killed.", allow_abbrev=False)
    add_shape_options(parser, hosts=6)
    parser.add_argument("--kills", type=int, default=30, help="0: only what --losses measures")
    parser.add_argument(
        "--limit", type=float, default=math.inf, metavar="S", help="no further kill so long after streams began"
    )
    parser.add_argument(
        "--losses", type=int, default=2, help="hosts that stay away, one after the other; 0: leave it out"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement of tokens per second")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument(
        "--idle",
        type=float,
        default=0.0,
        metavar="S",
        help="before each kill, seconds without a stream: on GPUs "
        "communicators and programs for what a loss leaves are made ready then",
    )
    parser.add_argument("--signal", choices=("kill", "stop", "both"), default="kill", help="both: in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and journals there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens per second (needs moe-jax[plot])")
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()
    if args.kills < (0 if args.losses and args.plot is None else 1):
        parser.error(f"--kills: found {args.kills}, expected at least 1, or 0 with --losses and without --plot")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        directory = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-recovery-")))
        result = in_loop(run(args, directory, say))
    show(Console(width=None if sys.stdout.isatty() else 140), result)
    if args.plot is not None:
        plot(result, args.plot)
    if args.json:
        print(json.dumps(result))
    return 0 if result["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
