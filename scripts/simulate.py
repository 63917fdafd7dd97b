"""Goodput of a cluster whose hosts fail: elastic, against one that restarts as a whole. A discrete-event simulation.

    python scripts/simulate.py [--mtbf-hours 500 --repair-hours 2 --days 30] [--plot goodput.png] [--json]
    python scripts/bench_recovery.py --hosts 4 --json > measured; python scripts/simulate.py --measured measured

Every host fails at random (exponential times), and comes back after a repair (exponential, too). Times in seconds:

    elastic   a loss pauses all for --pause; it costs its requests' tokens again (--replay), serves with what is left
              while the promise, or slots enough, allow it, and a return pauses all for --rejoin. Losses that no
              placement survives (fewer than --floor of the hosts are left) stop it until a host returns.
              With --reload, losses of all replicas of an expert, as likely as two losses at once, load it first.
    restart   a loss stops all: --detect until it is noticed and --restart until everything serves again, on the hosts
              that are left; a return is taken in by a restart at once (--eager) or at the next loss.

Goodput is the share of the tokens that all hosts would have served without any failure. Pause and rejoin are measured
ones: by default the README's medians (demo model, 4 hosts on 2 cores), with --measured those of any run of
bench_recovery.py, and then restart is that run's, too. Its default is what others report for a large model: 150 s (2
to 3 minutes on 32 GPUs). --detect, --replay and --reload are assumptions. Throughput is taken as proportional to live
hosts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Times:
    """Seconds."""

    mtbf: float  # of one host
    repair: float
    pause: float  # a loss, elastic
    rejoin: float  # a return, elastic
    replay: float  # of the lost host's share, to prefill its requests again
    reload: float  # loading experts of which no replica is left
    detect: float  # restart: until the loss is noticed
    restart: float


@dataclass
class Outcome:
    goodput: float
    stopped: float  # share of the time
    failures: int
    reloads: int


def elastic(ranks: int, times: Times, horizon: float, floor: float, random: np.random.Generator) -> Outcome:
    """Serves on through losses."""
    return _simulate(ranks, times, horizon, floor, random, None)


def restarting(
    ranks: int, times: Times, horizon: float, floor: float, random: np.random.Generator, eager: bool = False
) -> Outcome:
    """Stops for each loss; takes returned hosts in at once (eager) or with the next loss's restart."""
    return _simulate(ranks, times, horizon, floor, random, eager)


def _simulate(
    ranks: int, times: Times, horizon: float, floor: float, random: np.random.Generator, eager: bool | None
) -> Outcome:
    """Events in order of time: (when, what, host). Between two events the number of serving hosts is constant."""
    events = [(float(t), "fail", host) for host, t in enumerate(random.exponential(times.mtbf, ranks))]
    heapq.heapify(events)
    present, serving = set(range(ranks)), set(range(ranks))  # repaired, and taken in
    now, stopped_until = 0.0, 0.0
    work = idle = 0.0
    failures = reloads = 0
    last_loss = -np.inf

    while events and now < horizon:
        when, what, host = heapq.heappop(events)
        until = min(when, horizon)
        held = min(max(stopped_until, now), until)  # nothing is served before that
        up = len(serving) >= floor * ranks
        work += (until - held) * len(serving) * up
        idle += held - now + (until - held) * (not up)
        now = until
        if when >= horizon:
            break
        if what == "fail":
            failures += 1
            present.discard(host)
            was_serving = host in serving
            serving.discard(host)
            heapq.heappush(events, (now + float(random.exponential(times.repair)), "return", host))
            if not was_serving:
                continue
            if eager is None:
                work -= times.replay  # of one host
                pause = times.pause
                if now - last_loss < times.pause:  # the second within one recovery: replication 2 may not be enough
                    reloads += 1
                    pause += times.reload
                last_loss = now
            else:
                serving = set(present)
                pause = times.detect + times.restart
            stopped_until = max(stopped_until, now) + pause if eager is None else now + pause
        else:
            present.add(host)
            heapq.heappush(events, (now + float(random.exponential(times.mtbf)), "fail", host))
            if eager is None:
                serving.add(host)
                stopped_until = max(stopped_until, now + times.rejoin)
            elif eager or len(serving) < floor * ranks:
                serving = set(present)
                stopped_until = now + times.restart
    return Outcome(work / (horizon * ranks), idle / horizon, failures, reloads)


def compare(times: Times, horizon: float, floor: float, seeds: int, sizes: tuple[int, ...] = RANKS) -> list[dict]:
    """For each size the means of `seeds` runs; both see the same first failures."""
    ways: dict[str, Any] = {
        "elastic": elastic,
        "restart": restarting,
        "restart_eager": lambda *a: restarting(*a, eager=True),
    }
    rows = []
    for ranks in sizes:
        row: dict[str, Any] = {"ranks": ranks}
        for name, way in ways.items():
            runs = [way(ranks, times, horizon, floor, np.random.default_rng(seed)) for seed in range(seeds)]
            goodput = [run.goodput for run in runs]
            spread = statistics.stdev(goodput) / seeds**0.5 if seeds > 1 else 0.0
            row[name] = {
                "goodput": round(statistics.mean(goodput), 5),
                "error": round(spread, 5),
                "stopped": round(statistics.mean(run.stopped for run in runs), 5),
                "failures": round(statistics.mean(run.failures for run in runs), 1),
            }
        rows.append(row)
    return rows


def measured(path: Path) -> dict[str, float]:
    """Seconds of pause, rejoin and restart, from the last line of what bench_recovery.py --json printed.

    Raises ValueError when it is something else.
    """
    try:
        found = json.loads(path.read_text().splitlines()[-1])
        return {
            "pause": found["pause_ms"]["median"] / 1e3,
            "rejoin": found["rejoin_ms"]["median"] / 1e3,
            "restart": found["restart_ms"] / 1e3,
        }
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{path}: expected what bench_recovery.py --json printed: {e!r}") from None


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Goodput, and beside it on a logarithmic axis what is lost of it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=150)
    goodput, lost = figure.subplots(1, 2)
    for name, label in (
        ("elastic", "elastic"),
        ("restart", "restart at each loss"),
        ("restart_eager", "restart at each loss and return"),
    ):
        ranks = [row["ranks"] for row in rows]
        share = np.array([row[name]["goodput"] for row in rows])
        error = 2 * np.array([row[name]["error"] for row in rows])
        style: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.2, "capsize": 3}
        goodput.errorbar(ranks, share, error, label=label, **style)
        below = np.minimum(error, 0.99 * (1 - share))  # a logarithmic axis has no zero
        lost.errorbar(ranks, 1 - share, [below, error], **style)
    goodput.set_title("goodput, of that without failures (bars: two standard errors)", fontsize="medium")
    lost.set_title("what is lost of it", fontsize="medium")
    lost.set_yscale("log")
    for axes in (goodput, lost):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([row["ranks"] for row in rows], [str(row["ranks"]) for row in rows])
        axes.set_xlabel("ranks, each its own host")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3, which="both")
    goodput.legend(loc="lower left")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf-hours", type=float, default=2000.0, help="of one host")
    parser.add_argument("--repair-hours", type=float, default=1.0, help="until a failed host is back")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds without a token, at a loss")
    parser.add_argument("--rejoin", type=float, default=0.26, help="seconds without a token, at a return")
    parser.add_argument("--replay", type=float, default=5.0, help="seconds of one host's work that its loss costs")
    parser.add_argument("--reload", type=float, default=10.0, help="seconds to load experts from a checkpoint")
    parser.add_argument("--detect", type=float, default=10.0, help="seconds until a restart is begun")
    parser.add_argument("--restart", type=float, default=150.0, help="seconds until all serve again")
    parser.add_argument("--floor", type=float, default=0.5, help="share of the hosts that can hold all experts")
    parser.add_argument("--days", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (needs the extra moe-jax[plot])")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="pause, rejoin and restart: what bench_recovery.py --json printed"
    )
    args = parser.parse_args()
    if args.measured is not None:
        try:
            vars(args).update(measured(args.measured))
        except (OSError, ValueError) as e:
            parser.error(f"--measured: {e}")
    times = Times(
        args.mtbf_hours * 3600,
        args.repair_hours * 3600,
        *(getattr(args, name) for name in ("pause", "rejoin", "replay", "reload", "detect", "restart")),
    )
    rows = compare(times, args.days * 86400, args.floor, args.seeds)
    if args.plot is not None:
        plot(
            rows,
            f"a host fails every {args.mtbf_hours:g} h and is back after {args.repair_hours:g} h; elastic: "
            f"{times.pause:g} s without a token at a loss, {times.rejoin:g} s at a return;\n"
            f"restart: {times.detect:g} s until it is begun, {times.restart:g} s until all serve again",
            args.plot,
        )
    if args.json:
        print(json.dumps({"times": asdict(times), "days": args.days, "rows": rows}))
        return
    print(f"goodput over {args.days:g} days")
    print(f"{'ranks':>6}  {'failures':>8}  {'elastic':>16}  {'restart':>16}  {'restart eagerly':>16}")
    for row in rows:
        shares = [f"{row[n]['goodput']:.4f} ± {row[n]['error']:.4f}" for n in ("elastic", "restart", "restart_eager")]
        print(f"{row['ranks']:>6}  {row['elastic']['failures']:>8}  " + "  ".join(f"{s:>16}" for s in shares))


if __name__ == "__main__":
    main()
