"""`moe-jax plan`: places experts and says what the placement survives. Pure computation: no cluster, no JAX.

Without options it plans a set-up for which others have published figures: 256 experts and as many extra slots on 32
ranks, 58 layers (DeepSeek-V3), losing 1, 2, 4, 8 and 16 of them. `--eplb` puts an EPLB placement beside it,
`--scatter 1 7 31` compares three widths.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.command import bad_input

if TYPE_CHECKING:
    import numpy as np

    from moe_jax.placement import Changes, Report

_MOST_PRIMARIES = 5_000_000  # in the tables of --survivors
DEEPSEEK_V3 = 3 * 7168 * 2048  # bytes of an expert's weights in float8, as published


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is placed")
    group.add_argument("--model", metavar="DIR", help="'demo' or a model directory: layers, experts and their bytes")
    group.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: config.json is enough")
    group.add_argument("--layers", type=int, metavar="N", help="layers with experts (default: 58)")
    group.add_argument("--experts", type=int, metavar="N", help="experts of each layer (default: 256)")
    group.add_argument(
        "--expert-bytes", type=int, metavar="N", help=f"weights of one expert (default: {DEEPSEEK_V3}, DeepSeek-V3)"
    )
    group.add_argument(
        "--load", default="equal", metavar="KIND|FILE", help="equal, uniform, zipf, lognormal, or .npy, .json, text"
    )
    group = parser.add_argument_group("where")
    group.add_argument("--hosts", type=int, default=32, metavar="N", help="failure domains")
    group.add_argument("--ranks-per-host", type=int, default=1, metavar="N")
    group.add_argument("--hosts-per-rack", type=int, metavar="N", help="report on racks, too")
    group.add_argument(
        "--slots", type=int, metavar="S", help="of a layer and rank (default: the fewest that keep the promise)"
    )
    group.add_argument("--replication", type=int, default=2, metavar="R", help="hosts that hold each expert")
    group.add_argument(
        "--scatter",
        type=int,
        nargs="+",
        metavar="W",
        help="with about how many hosts a host shares, more to compare "
        "(default: as few as cost no balance, for the fewest fatal losses)",
    )
    group = parser.add_argument_group("what is reported")
    group.add_argument("--lose", type=int, nargs="+", metavar="K", help="lost hosts (default: 1 2 4 8 … below all)")
    group.add_argument(
        "--lost", nargs="+", default=[], metavar="HOST", help="what moves when these are lost and return"
    )
    group.add_argument(
        "--survivors", type=int, default=0, metavar="K", help="in --json: what serves after every loss of up to K hosts"
    )
    group.add_argument("--before", type=Path, metavar="FILE", help="an earlier plan's JSON: keep it where load allows")
    group.add_argument("--within", type=float, default=1.2, metavar="X", help="imbalance that --before may keep")
    group.add_argument("--eplb", action="store_true", help="put an EPLB placement of the same slots beside it")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw it (needs the extra moe-jax[plot])")
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")


@dataclass(frozen=True)
class Setup:
    layers: int
    experts: int
    expert_bytes: int
    slots: int
    replication: int
    hosts: list[str]  # of each rank
    racks: list[str] | None
    load: np.ndarray | None  # None: equal
    load_name: str
    losses: list[int]  # hosts

    @staticmethod
    def of(args: argparse.Namespace) -> Setup:
        """Raises ValueError, and OSError for a file that cannot be read."""
        from moe_jax.placement import LOADS, make_load, read_load

        numbers = ("hosts", "ranks_per_host", "hosts_per_rack", "replication", "slots", "layers", "experts")
        for name in numbers:
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
        layers, experts, size = args.layers or 58, args.experts or 256, args.expert_bytes or DEEPSEEK_V3
        if args.model is not None:
            if args.layers or args.experts or args.expert_bytes:
                raise ValueError("--model: found --layers, --experts or --expert-bytes too, which it says itself")
            layers, experts, size = _measures(args.model, args.load_format)
        ranks = args.hosts * args.ranks_per_host
        hosts = [f"host{i // args.ranks_per_host}" for i in range(ranks)]
        racks = None
        if args.hosts_per_rack:
            racks = [f"rack{i // (args.hosts_per_rack * args.ranks_per_host)}" for i in range(ranks)]
        if args.load == "equal":
            load = None
        elif args.load in LOADS:
            load = make_load(args.load, layers, experts)
        elif Path(args.load).exists():
            load = read_load(Path(args.load))
        else:
            raise ValueError(f"--load: found {args.load!r}, expected one of {', '.join(LOADS)}, or a file")
        losses = args.lose or [2**i for i in range(16) if 2**i < args.hosts]
        if any(not 0 < k < args.hosts for k in losses):
            raise ValueError(f"--lose: found {losses}, expected numbers from 1 to {args.hosts - 1}, the hosts but one")
        if unknown := sorted(set(args.lost) - set(hosts)):
            raise ValueError(f"--lost: found {' '.join(unknown)}, expected some of host0 to host{args.hosts - 1}")
        slots = args.slots or -(-experts * args.replication // ranks)
        return Setup(layers, experts, size, slots, args.replication, hosts, racks, load, args.load, sorted(set(losses)))

    @property
    def rank_bytes(self) -> int:
        """Expert weights of a rank."""
        return self.layers * self.slots * self.expert_bytes


def _measures(model: str, load_format: str) -> tuple[int, int, int]:
    """Layers with experts, experts, and bytes of an expert, as an engine holds them."""
    from moe_jax.checkpoint import open_checkpoint, param_types
    from moe_jax.llm import model_directory

    checkpoint = open_checkpoint(model_directory(model), load_format)  # type: ignore[arg-type]
    config = checkpoint.config
    types = [s["experts_down"] for s in param_types(checkpoint, "bfloat16")["segments"] if "experts_down" in s]
    size = 3 * config.hidden_size * config.moe_intermediate_size * types[0].itemsize
    return config.num_moe_layers, config.num_experts, size


@dataclass(frozen=True)
class Planned:
    """A placement and what is to be said of it."""

    name: str
    slots: np.ndarray  # [layers, ranks, slots]
    seconds: float
    report: Report
    scatter: int | None = None  # None: all hosts
    bound: float | None = None  # what its imbalance cannot go below
    moved: int | None = None  # slots, from --before to here


@bad_input()
def run(args: argparse.Namespace) -> int:
    """Raises UsageError for what cannot be planned, OSError for a file that cannot be used."""
    import numpy as np

    from moe_jax import placement

    setup = Setup.of(args)
    before = None if args.before is None else _read_before(args.before, setup)
    shape = setup.layers, setup.experts, setup.hosts

    def plan(scatter: int | None) -> np.ndarray:
        return placement.plan(*shape, setup.slots, setup.replication, setup.load, scatter)

    if args.survivors and not args.json:
        raise ValueError("--survivors: found no --json, expected it: tables of all losses are nothing to read")
    begun = time.perf_counter()
    widths: list[int | None] = list(args.scatter or [])
    if not widths and before is None:
        scatter = placement.choose_scatter(setup.experts, setup.hosts, setup.slots, setup.replication, setup.load)
        widths = [scatter]
    choosing, begun = time.perf_counter() - begun, time.perf_counter()
    if before is None:
        slots = plan(widths[0])
    else:
        everyone, load = range(len(setup.hosts)), np.ones(shape[:2]) if setup.load is None else setup.load
        slots = placement.restore(before, everyone, setup.hosts, setup.experts, setup.replication, setup.load)
        slots = placement.rebalance(slots, everyone, setup.hosts, setup.experts, setup.replication, load, args.within)
    seconds = time.perf_counter() - begun

    def describe(name: str, slots: np.ndarray, seconds: float, **more: Any) -> Planned:
        figures = placement.report(slots, setup.hosts, setup.experts, setup.load, setup.losses, setup.racks)
        return Planned(name, slots, seconds, figures, **more)

    load = np.ones(shape[:2]) if setup.load is None else setup.load
    bound = placement.imbalance_bound(len(setup.hosts), setup.slots, setup.replication, load)
    moved = None if before is None else placement.moves(before, slots)
    first, *others = widths or [None]
    name = f"scatter {first}" if args.scatter else "this plan"
    plans = [describe(name, slots, seconds, scatter=first, bound=bound, moved=moved)]
    for scatter in others:
        begun = time.perf_counter()
        other = plan(scatter)
        plans.append(describe(f"scatter {scatter}", other, time.perf_counter() - begun, scatter=scatter, bound=bound))
    if args.eplb:
        begun = time.perf_counter()
        other = placement.eplb(load, len(setup.hosts), setup.slots)
        plans.append(describe("EPLB", other, time.perf_counter() - begun))
    changes = None
    if args.lost:
        lost = [rank for rank, host in enumerate(setup.hosts) if host in args.lost]
        changes = placement.changes(slots, lost, setup.hosts, setup.experts, setup.replication, setup.load)
    if args.plot is not None:
        _plot(setup, plans, args.plot)
    if args.json:
        tables = {"survivors": _survivors(setup, slots, args.survivors)} if args.survivors else {}
        print(json.dumps(_as_json(setup, plans, changes) | tables))
    else:
        chosen = None if before is not None or args.scatter else choosing
        _print(setup, plans, changes, args.lost, chosen)
    return 0


def _read_before(path: Path, setup: Setup) -> np.ndarray:
    import numpy as np

    try:
        slots = np.array(json.loads(path.read_text())["slots"], np.int32)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: expected what `moe-jax plan --json` printed: {e}") from None
    expected = setup.layers, len(setup.hosts), setup.slots
    if slots.shape != expected or not (-1 <= slots.min() <= slots.max() < setup.experts):
        raise ValueError(f"{path}: found slots {slots.shape}, expected {expected} of {setup.experts} experts")
    return slots


# Output --------------------------------------------------------------------------------------------------------------


def _as_json(setup: Setup, plans: Sequence[Planned], changes: Changes | None) -> dict[str, Any]:
    import numpy as np

    from moe_jax.placement import primaries

    ours = plans[0]
    primary = np.stack(np.divmod(primaries(ours.slots, setup.experts), setup.slots), axis=-1)
    found = {
        "hosts": setup.hosts,
        "slots": ours.slots.tolist(),
        "primary": primary.tolist(),
        "replication": setup.replication,
        "scatter": ours.scatter,
        **_figures(setup, ours),
        "imbalance_bound": ours.bound,
        "rank_bytes": setup.rank_bytes,
        "expert_bytes": setup.expert_bytes,
    }
    if ours.moved is not None:
        found["moved"] = {"experts": ours.moved, "bytes": ours.moved * setup.expert_bytes}
    if changes is not None:
        size = setup.expert_bytes
        found["changes"] = vars(changes) | {
            "imbalance": _finite(changes.imbalance),
            "loaded_bytes": changes.loaded * size,
            "restored_bytes": changes.restored * size,
            "returned_bytes": changes.returned * size,
        }
    beside = {plan.name.replace(" ", "_").lower(): _figures(setup, plan) for plan in plans[1:]}
    return found | beside


def _survivors(setup: Setup, slots: np.ndarray, most: int) -> list[dict[str, Any]]:
    """For every set of up to `most` hosts that may be lost: what is loaded then, [layer, rank, slot, expert], before
    serving goes on, and the primaries, as of the whole; both None where too few slots are left.

    Raises ValueError when that is too much to print.
    """
    import numpy as np

    from moe_jax.placement import primaries, repair

    hosts = np.array(setup.hosts)
    names = list(dict.fromkeys(setup.hosts))
    sets = [lost for k in range(1, most + 1) for lost in combinations(names, k)]
    size = len(sets) * setup.layers * setup.experts
    if not 0 < most < len(names) or size > _MOST_PRIMARIES:
        raise ValueError(
            f"--survivors: found {most}, {size} primaries in {len(sets)} tables, expected 1 to {len(names) - 1} hosts "
            f"and at most {_MOST_PRIMARIES} primaries"
        )
    found = []
    for lost in sets:
        live = np.flatnonzero(~np.isin(hosts, lost))
        left = repair(slots, live.tolist(), setup.hosts, setup.experts)
        table: dict[str, Any] = {"lost": lost, "loaded": None, "primary": None}
        if left is not None:
            at = np.argwhere((left != slots) & (left >= 0))
            place, slot = np.divmod(primaries(left[:, live], setup.experts), setup.slots)
            table["loaded"] = np.column_stack([at, left[tuple(at.T)]]).tolist()
            table["primary"] = np.stack([live[place], slot], axis=-1).tolist()
        found.append(table)
    return found


def _figures(setup: Setup, plan: Planned) -> dict[str, Any]:
    report, size = plan.report, setup.expert_bytes
    lost = {str(loss.lost): loss for loss in report.losses if loss.lost}
    found: dict[str, Any] = {
        "survivable_host_losses": report.survivable_host_losses,
        "single_host_experts": report.single,
        "fatal_probability": {k: loss.fatal[0] for k, loss in lost.items()},
        "fatal_probability_error": {k: loss.fatal[1] for k, loss in lost.items()},
        "imbalance": {str(loss.lost): _finite(loss.imbalance) for loss in report.losses},
        "worst_imbalance": {str(loss.lost): _finite(loss.worst_imbalance) for loss in report.losses},
        "repair_bytes": {k: loss.loaded * size for k, loss in lost.items()},
        "worst_repair_bytes": {k: loss.worst_loaded * size for k, loss in lost.items()},
        "unservable": {k: loss.unservable for k, loss in lost.items()},
        "tried": {k: {"sets": loss.tried, "all": loss.all_tried} for k, loss in lost.items()},
        "seconds": round(plan.seconds, 6),
    }
    if report.survivable_rack_losses is not None:
        racks = {k: loss.fatal_racks for k, loss in lost.items() if loss.fatal_racks is not None}
        found["survivable_rack_losses"] = report.survivable_rack_losses
        found["fatal_rack_probability"] = {k: p for k, (p, _) in racks.items()}
        found["fatal_rack_probability_error"] = {k: e for k, (_, e) in racks.items()}
    return found


def _finite(x: float) -> float | None:
    """None for infinity, which JSON has no word for."""
    return x if math.isfinite(x) else None


def _print(
    setup: Setup, plans: Sequence[Planned], changes: Changes | None, lost: Sequence[str], choosing: float | None
) -> None:
    """choosing: seconds that finding a width took; None: it was given."""
    from rich.console import Console
    from rich.table import Table

    wide = None if sys.stdout.isatty() else 200  # characters: a file or a pipe has no end of the line
    console = Console(highlight=False, soft_wrap=True, width=wide)
    ranks, ours = len(setup.hosts), plans[0]
    total = ranks * setup.slots
    console.print(
        f"{setup.layers} layers × {setup.experts} experts in {total} slots on {ranks} ranks of "
        f"{len(set(setup.hosts))} hosts, {setup.slots} a layer and rank; replication {setup.replication}; expert "
        f"weights of a rank {_size(setup.rank_bytes)}"
    )
    for plan in plans:
        racks = plan.report.survivable_rack_losses
        console.print(
            f"{plan.name}: any {max(plan.report.survivable_host_losses, 0)} hosts"
            + ("" if racks is None else f", any {max(racks, 0)} racks")
            + f" may be lost with nothing to load; {plan.report.single} of {setup.layers * setup.experts} experts are "
            f"on one host only; imbalance {plan.report.losses[0].imbalance:.4f}"
            + ("" if plan.bound is None else f", which cannot be below {plan.bound:.4f}")
            + f"; placed in {1e3 * plan.seconds:.0f} ms"
        )
    if choosing is not None:
        width = "all others" if ours.scatter is None else f"{ours.scatter} others or a few more"
        console.print(
            f"a host shares the replicas that are promised with {width}: the fewest at which balance holds up, so that "
            f"the fewest further losses are fatal; found in {1e3 * choosing:.0f} ms"
        )
    if ours.moved is not None:
        console.print(f"moved: {ours.moved} slots, {_size(ours.moved * setup.expert_bytes)}")
    racks = ("racks lost instead",) if setup.racks else ()
    narrow: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    table = Table(**narrow)
    for head in ("hosts lost", "", "an expert is lost", *racks, "imbalance, worst", "to load, worst"):
        table.add_column(head, no_wrap=True)
    size = setup.expert_bytes
    for losses in zip(*(plan.report.losses[1:] for plan in plans), strict=True):
        for plan, loss in zip(plans, losses, strict=True):
            cells = [str(loss.lost) if plan is ours else "", plan.name, _chance(loss.fatal)]
            if setup.racks:
                cells.append("–" if loss.fatal_racks is None else _chance(loss.fatal_racks))
            if loss.unservable == 1:
                cells += ["too few slots", "–"]
            else:
                cells.append(f"{_uneven(loss.imbalance)}, {_uneven(loss.worst_imbalance)}")
                cells.append(f"{_size(loss.loaded * size)}, {_size(loss.worst_loaded * size)}")
            table.add_row(*cells)
    console.print(table)
    tried = [f"{loss.tried} sets of {loss.lost}" for loss in ours.report.losses if not loss.all_tried]
    if tried:
        console.print(f"imbalance and what is to load: of {', '.join(tried)} drawn at random, of others all")
    if changes is not None:
        if changes.survivable_host_losses < 0:
            console.print(f"{' '.join(lost)} lost: too few slots are left for all experts")
            return
        console.print(
            f"{' '.join(lost)} lost: {changes.loaded} slots ({_size(changes.loaded * size)}) are loaded before serving "
            f"goes on, {changes.restored} ({_size(changes.restored * size)}) after it; then imbalance "
            f"{changes.imbalance:.3f}, and any {changes.survivable_host_losses} more may be lost. When they return "
            f"they load {changes.returned} ({_size(changes.returned * size)}), the others {changes.moved_by_return}"
        )


def _chance(chance: tuple[float, float]) -> str:
    p, error = chance
    return f"{p:.4f}" if error == 0 else f"{p:.4f} ± {error:.4f}"


def _uneven(x: float) -> str:
    return f"{x:.3f}" if math.isfinite(x) else "∞"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _plot(setup: Setup, plans: Sequence[Planned], path: Path) -> None:
    """Chance of a dead expert, imbalance, and what a repair loads, over the number of lost hosts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot: matplotlib is not installed; pip install 'moe-jax[plot]'") from None
    figure = Figure(figsize=(13, 4.5), layout="constrained", dpi=150)
    chance, uneven, loaded = figure.subplots(1, 3)
    for i, plan in enumerate(plans):
        losses = plan.report.losses
        beside = 0.09 * (i - (len(plans) - 1) / 2)  # so that no plan hides another
        at = [j + beside for j in range(len(losses))]
        bars: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.2, "capsize": 3, "color": f"C{i}"}
        fatal = [100 * x.fatal[0] for x in losses]
        chance.errorbar(at, fatal, [200 * x.fatal[1] for x in losses], label=plan.name, **bars)
        finite = [(j, x) for j, x in zip(at, losses, strict=True) if math.isfinite(x.worst_imbalance)]
        above = [x.worst_imbalance - x.imbalance for _, x in finite]
        mean = [x.imbalance for _, x in finite]
        uneven.errorbar([j for j, _ in finite], mean, [[0] * len(above), above], **bars)
        size = setup.expert_bytes / 1e9
        above = [(x.worst_loaded - x.loaded) * size for x in losses]
        loaded.errorbar(at, [x.loaded * size for x in losses], [[0] * len(above), above], **bars)
    chance.set_title("Some expert is lost: chance, %", fontsize="medium")
    uneven.set_title("Imbalance: most loaded rank / mean", fontsize="medium")
    loaded.set_title("To load before serving goes on, GB", fontsize="medium")
    for axes in (chance, uneven, loaded):
        lost = [loss.lost for loss in plans[0].report.losses]
        axes.set_xticks(range(len(lost)), [str(k) for k in lost])
        axes.grid(alpha=0.3)
    chance.set_xlabel("hosts lost (bars: two standard errors)")
    uneven.set_xlabel("hosts lost (mean; bars up to the worst tried)")
    loaded.set_xlabel("hosts lost (mean; bars up to the worst tried)")
    chance.legend()
    loads = "equal load" if setup.load is None else f"load {setup.load_name}"
    figure.suptitle(
        f"{setup.layers} layers × {setup.experts} experts in {len(setup.hosts)} ranks × {setup.slots} slots on "
        f"{len(set(setup.hosts))} hosts, replication {setup.replication}, {loads}"
    )
    figure.savefig(path)
