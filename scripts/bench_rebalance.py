"""How long streams wait while experts move, against stretches of the same streams in which nothing moves.

    python scripts/bench_rebalance.py [--hosts 3 --replication 2 --streams 12 --moves 24] [--json]

A cluster serves `streams` requests, and others after every fourth move; none begins or ends while it is measured. Again
and again a new load is drawn (lognormal), the coordinator works out which replicas should move for it and has them
moved, as it does for a load that was measured and as `moe-jax rebalance` does: weights are fetched beside the steps,
and put in place between two of them, a part at a time. (Loads for which nothing should move are passed over.) Counted
is from the order to move until 0.3 s after all ranks hold what they should: what follows, such as tables for the next
loss, is a part of it. Between two moves is a stretch, as long as the last move with what followed, in which nothing
moves.

    a step     the median gap between two tokens of one stream in the stretches without a move
    pause      what the longest gap of any stream during a move has more than a step, in steps
    without    the same of each stretch without a move: what the machine does by itself, and what a pause is to be
               compared with. Where more engines than cores share a machine, their steps wait for each other, and in
               that many steps some are twice as long as the median one
    between    what the slowest engine did between two steps for a part of a move: agree, put weights in place, rebuild

--layers takes a model of random weights with so many layers and 64 experts in each instead of the demo, whose tokens
are compared with those of one host that nothing happens to.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _cluster import machine, make_jobs
from rich.console import Console
from rich.table import Table

from moe_jax import LLM, SamplingParams, placement
from moe_jax.llm import model_directory
from serving.cluster_backend import ClusterBackend

SETTLE = 2.0  # seconds until all streams have been prefilled
ROUND = 4  # moves, then the streams are followed by new ones, before they reach the end of what the model can hold
AFTER = 0.3  # seconds behind a move that are counted as a part of it
REST = 0.3  # seconds before and after each stretch


class Streams:
    """Requests, and when each token of each came."""

    def __init__(self, llm: LLM, count: int, tokens: int, seed: int) -> None:
        self.jobs = make_jobs(count, seed, tokens, tokens)
        self.llm, self.tokens = llm, tokens
        ids = [llm.submit(job.prompt, params_of(job)) for job in self.jobs]
        self.found: dict[str, list[int]] = {request_id: [] for request_id in ids}
        self._last: dict[str, float] = {}
        self._gaps: list[tuple[float, float]] = []  # begin, end

    def follow(self, done: Callable[[], bool]) -> None:
        """Take tokens until then. Raises RuntimeError when a stream has ended."""
        while not done():
            for update in self.llm.poll(0.02):
                now, found = time.monotonic(), self.found[update.request_id]
                found += update.token_ids
                if len(found) >= self.tokens:
                    raise RuntimeError(f"streams: found one that has all {self.tokens} tokens: give it more --tokens")
                if update.token_ids and update.request_id in self._last:
                    self._gaps.append((self._last[update.request_id], now))
                self._last[update.request_id] = now

    def rest(self, seconds: float) -> tuple[float, float]:
        """Take tokens so long; from when to when that was."""
        begun = time.monotonic()
        self.follow(lambda: time.monotonic() > begun + seconds)
        return begun, time.monotonic()

    def gaps(self, since: float, until: float) -> list[float]:
        """Milliseconds, of the gaps that began before `until` and ended after `since`."""
        return [1e3 * (b - a) for a, b in self._gaps if a < until and b > since]


def params_of(job: Any) -> SamplingParams:
    return SamplingParams(max_tokens=job.max_tokens, temperature=job.temperature, seed=job.seed, ignore_eos=True)


def write_model(layers: int, directory: Path) -> str:
    """The demo's config with more of everything that is moved, and its tokenizer."""
    directory.mkdir(parents=True)
    demo = model_directory("demo")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, directory)
    raw = json.loads((demo / "config.json").read_text()) | {"num_hidden_layers": layers, "num_experts": 64}
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


def move(llm: LLM, streams: Streams, draw: Callable[[], np.ndarray]) -> tuple[int, float, float]:
    """Have experts moved for the first load drawn that asks for it; how many slots changed, and from when to when."""
    assert isinstance(llm._backend, ClusterBackend)
    running = llm._backend._running
    coordinator = running.coordinator

    async def rebalance() -> int:
        epoch = coordinator.placement
        better = coordinator.cluster.rebalance  # in a thread: tokens go on through this loop
        goal = await asyncio.to_thread(better, epoch.slots, sorted(epoch.order), draw(), 1.0)
        await coordinator.move(epoch.number, goal)
        return placement.moves(epoch.slots, goal)

    slots, begun, ended = 0, 0.0, 0.0
    while not slots:
        begun = time.monotonic()
        future = running.begin(rebalance())
        streams.follow(future.done)
        slots, ended = future.result(), time.monotonic()
    return slots, begun, ended


def measure(llm: LLM, count: int, tokens: int, moves: int, seed: int) -> tuple[dict[str, Any], list[Streams]]:
    backend: Any = llm._backend
    model = backend.model
    random = np.random.default_rng(seed)
    draw = partial(random.lognormal, 0.0, 1.0, (model.num_moe_layers, model.num_experts))
    backend._running.call(backend._running.coordinator.rebalancing.stop)  # nothing moves by itself
    deadline = time.monotonic() + 240.0
    while backend.status()["survivable_without_compiling"] < 1:
        if time.monotonic() > deadline:
            raise TimeoutError("programs of smaller meshes: not within 240 s")
        time.sleep(0.1)
    rounds: list[Streams] = []
    slots, seconds, moved, still = [], [], [], []  # the last two: the gaps of each move, and of each stretch
    for i in range(moves):
        if i % ROUND == 0:
            for request_id in rounds[-1].found if rounds else ():
                llm.cancel(request_id)
            rounds.append(Streams(llm, count, tokens, seed + len(rounds)))
            rounds[-1].rest(SETTLE)
        streams = rounds[-1]
        changed, begun, ended = move(llm, streams, draw)
        streams.rest(AFTER + REST)
        stretch = streams.rest(ended + AFTER - begun)
        streams.rest(REST)
        slots.append(changed)
        seconds.append(ended - begun)
        moved.append(streams.gaps(begun, ended + AFTER))
        still.append(streams.gaps(*stretch))
    status = backend.status()
    step = statistics.median(gap for gaps in still for gap in gaps)
    parts = [s for s in status["switches"] if s["cause"] == "rebalance"]
    between = [p["agree_ms"] + p["load_ms"] + p["rebuild_ms"] for p in parts]
    found = {
        "step_ms": round(step, 2),
        "slots": slots,
        "parts": len(parts),
        "seconds": [round(s, 3) for s in seconds],
        "pause_steps": [round(max(gaps) / step - 1, 2) for gaps in moved],
        "without_steps": [round(max(gaps) / step - 1, 2) for gaps in still],
        "between_ms": [round(b, 2) for b in between],
        "compilations": status["compilations"],
    }
    for request_id in rounds[-1].found:
        llm.cancel(request_id)
    return found, rounds


def compare(rounds: list[Streams], options: dict[str, Any]) -> int:
    """Tokens that differ from those of one host."""
    jobs = [job for streams in rounds for job in streams.jobs]
    with LLM("demo", **options) as alone:
        outputs = alone.generate([job.prompt for job in jobs], [params_of(job) for job in jobs])
    pairs = zip((tokens for streams in rounds for tokens in streams.found.values()), outputs, strict=True)
    return sum(a != b for found, out in pairs for a, b in zip(found, out.outputs[0].token_ids, strict=False))


def show(console: Console, r: dict[str, Any]) -> None:
    console.print(f"{r['cpu']}, {r['cores']} cores; jax {r['jax']}; {r['hosts']} hosts, {r['streams']} streams")
    title = f"{len(r['slots'])} moves, {sum(r['slots'])} slots, {r['parts']} parts"
    table = Table("", "median", "worst", "above 1", title=title)
    rows = (
        ("pause, steps", r["pause_steps"]),
        ("without a move, steps", r["without_steps"]),
        ("between two steps, ms", r["between_ms"]),
        ("a move, s", r["seconds"]),
    )
    for name, values in rows:
        above = f"{sum(v > 1 for v in values)} of {len(values)}" if name.endswith("steps") else ""
        table.add_row(name, f"{statistics.median(values):.2f}", f"{max(values):.2f}", above)
    console.print(table)
    changed = "not compared" if r["changed"] is None else f"{r['changed']} of {r['tokens']} tokens changed"
    console.print(f"a step is {r['step_ms']} ms; {r['compilations']} programs were compiled; {changed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--replication", type=int, default=2)
    parser.add_argument(
        "--slots", type=int, help="of a layer and rank (default: a quarter more than the replicas need)"
    )
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream: more than there is time for")
    parser.add_argument("--moves", type=int, default=24)
    parser.add_argument("--layers", type=int, help="of a model of random weights (default: the demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()
    options: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32}
    with contextlib.ExitStack() as stack:
        model, experts, load_format = "demo", 16, "auto"
        if args.layers is not None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-rebalance-")))
            model, experts, load_format = write_model(args.layers, directory / "model"), 64, "dummy"
        slots = args.slots or -(-5 * experts * args.replication // (4 * args.hosts))
        placed = {"slots": slots, "replication": args.replication}
        llm = stack.enter_context(LLM(model, args.hosts, load_format=load_format, **placed, **options))
        found, rounds = measure(llm, args.streams, args.tokens, args.moves, args.seed)
    tokens = sum(len(found) for streams in rounds for found in streams.found.values())
    changed = compare(rounds, options) if args.layers is None else None
    result = {**machine(), "hosts": args.hosts, "streams": args.streams, **found, "tokens": tokens, "changed": changed}
    show(Console(width=None if sys.stdout.isatty() else 140, highlight=False), result)
    if args.json:
        print(json.dumps(result))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
