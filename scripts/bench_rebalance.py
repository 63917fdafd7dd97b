"""How long streams wait while experts move after their load, against the same streams just before and just after.

    python scripts/bench_rebalance.py [--hosts 3 --streams 12 --rounds 3] [--json]

--layers takes a model of random weights with so many layers and 64 experts in each instead of the demo; its tokens are
counted and not compared.

In each round a cluster is started whose experts lie as if all had the same load, and `streams` requests run in it, none
beginning or ending while it is measured. Then `Rebalance` is called, as `moe-jax rebalance` does: weights are fetched
beside the steps and put in place a part at a time, until experts lie as the measured load wants. All in one run:

    before, during, after    the gaps between two tokens of one stream, in ms: median, 99th percentile, longest
    a step                   the median gap before
    pause                    what the longest gap during the move has more than a step, in steps
    undisturbed              the same of stretches before and after that are as long as the move: their median and worst
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
from _cluster import START, Cluster, Job, Output, Shape, Traffic, expected_outputs, is_whole, machine, make_jobs
from _cluster import run as in_loop
from rich.console import Console
from rich.table import Table

from moe_jax.llm import model_directory
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

SETTLE = 6.0  # seconds until all streams have been prefilled and what goes on behind a start is over
HANG = 60.0  # seconds without a token
PHASES = ("agree", "load", "rebuild", "resume", "pause")

Gaps = list[tuple[float, float]]  # (begin, end)


def spread(gaps: Gaps) -> dict[str, float]:
    """Milliseconds."""
    ms = sorted(1e3 * (end - begin) for begin, end in gaps)
    found = {"median": statistics.median(ms), "p99": ms[int(0.99 * (len(ms) - 1))], "longest": ms[-1]}
    return {name: round(value, 2) for name, value in found.items()}


def longest_by_stretch(gaps: Gaps, since: float, until: float, seconds: float) -> list[float]:
    """The longest gap in each stretch of so many seconds."""
    count = int((until - since) / seconds)
    found = []
    for i in range(count):
        begin = since + i * seconds
        found.append(max((b - a for a, b in gaps if a < begin + seconds and b > begin), default=0.0))
    return found


def write_model(layers: int, directory: Path) -> str:
    """The demo's config with more of everything that is moved, and its tokenizer."""
    directory.mkdir(parents=True)
    demo = model_directory("demo")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, directory)
    raw = json.loads((demo / "config.json").read_text()) | {"num_hidden_layers": layers, "num_experts": 64}
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


async def measure(
    shape: Shape, directory: Path, jobs: list[Job], expected: dict[Job, Output], seconds: float
) -> dict[str, Any]:
    """One cluster, one move."""
    async with Cluster(shape, directory) as cluster:
        await cluster.until(lambda s: is_whole(s) and s["survivable_without_compiling"] > 0, START, "a start")
        traffic = Traffic(cluster.address, jobs, expected, len(jobs), HANG, once=True)
        traffic.start()
        await asyncio.sleep(SETTLE)
        first = time.monotonic()
        await asyncio.sleep(seconds)
        async with grpc.aio.insecure_channel(cluster.address) as channel:
            began = time.monotonic()
            moved = await rpc.AdminStub(channel).Rebalance(pb.RebalanceRequest(), timeout=60.0)
            ended = time.monotonic()
        await asyncio.sleep(seconds)
        last = time.monotonic()
        running = traffic.running
        status = await cluster.status()
        await traffic.stop()
    switches = [s for s in status["switches"] if s["cause"] == "rebalance"]
    if running < len(jobs):
        raise RuntimeError(f"streams: found {running} at the end, expected all {len(jobs)}: give them more --tokens")
    before, during, after = (traffic.gaps(*w) for w in ((first, began), (began, ended), (ended, last)))
    step, stretch = spread(before)["median"], max(ended - began, 0.5)
    undisturbed = longest_by_stretch(before, first, began, stretch) + longest_by_stretch(after, ended, last, stretch)
    more = [1e3 * gap / step - 1 for gap in undisturbed]
    return {
        "slots": moved.slots,
        "parts": len(switches),
        "seconds": round(ended - began, 3),
        "streams": running,
        "step_ms": step,
        "before": spread(before),
        "during": spread(during),
        "after": spread(after),
        "pause_steps": round(spread(during)["longest"] / step - 1, 2),
        "undisturbed_steps": {"median": round(statistics.median(more), 2), "worst": round(max(more), 2)},
        "phases_ms": [{name: s[f"{name}_ms"] for name in PHASES} for s in switches],
        "compilations": status["compilations"],
        "clean": traffic.tally.clean,
        "compared": shape.exact,
        "details": traffic.tally.details,
    }


async def run(args: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    shape = Shape(args.hosts, slots=args.slots, max_batch=args.max_batch)
    if args.layers is not None:
        shape = replace(shape, model=write_model(args.layers, directory / "model"), load_format="dummy")
    rounds, jobs = [], make_jobs(args.streams, args.seed, args.tokens, args.tokens)
    say("what the requests give on one host, and programs")
    expected = await asyncio.to_thread(expected_outputs, jobs, shape)
    for i in range(args.rounds):
        say(f"round {i + 1}: {shape}")
        rounds.append(await measure(shape, directory / str(i), jobs, expected, args.seconds))
    return {**machine(), "hosts": args.hosts, "rounds": rounds, "clean": all(r["clean"] for r in rounds)}


def show(console: Console, result: dict[str, Any]) -> None:
    console.print(f"{result['cpu']}, {result['cores']} cores; jax {result['jax']}", highlight=False, soft_wrap=True)
    table = Table("round", "slots, parts", "s", "streams", "before", "during", "after", "pause", "undisturbed")
    for i, r in enumerate(result["rounds"], 1):
        gaps = ("{median} {p99} {longest}".format(**r[name]) for name in ("before", "during", "after"))
        noise = "{median} … {worst}".format(**r["undisturbed_steps"])
        moved = f"{r['slots']}, {r['parts']}"
        table.add_row(str(i), moved, str(r["seconds"]), str(r["streams"]), *gaps, f"{r['pause_steps']}", noise)
    console.print(table)
    for r in result["rounds"]:
        for phases in r["phases_ms"]:
            console.print("a part: " + ", ".join(f"{n} {v} ms" for n, v in phases.items()), highlight=False)
        for detail in r["details"]:
            console.print(detail, markup=False)
    wanted = "those of an undisturbed run" if result["rounds"][0]["compared"] else "as many as were asked for"
    compiled = sum(r["compilations"] for r in result["rounds"])
    console.print(f"{compiled} programs were compiled; tokens are {'' if result['clean'] else 'NOT '}{wanted}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of a model of random weights (default: the demo)")
    parser.add_argument("--slots", type=int, help="of a layer and rank (default: the fewest that keep two replicas)")
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=900, help="of each stream: more than there is time for")
    parser.add_argument("--max-batch", type=int, help="of a rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="undisturbed ones, before the move and after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep logs and journals there")
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        directory = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rebalance-")))
        result = in_loop(run(args, directory, lambda text: print(text, file=sys.stderr, flush=True)))
    show(Console(width=None if sys.stdout.isatty() else 160), result)
    if args.json:
        print(json.dumps(result))
    return 0 if result["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
