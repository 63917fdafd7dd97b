"""What a cluster serves, and by what rules: everything that is decided before its first process starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import placement
from moe_jax.checkpoint import open_checkpoint
from moe_jax.config import ConfigError, EngineConfig, ModelConfig
from moe_jax.llm import engine_config
from moe_jax.scheduler import Limits
from serving.environment import Platform
from serving.epoch import Slots
from serving.membership import Rules
from serving.rebalancing import Policy

_KEPT = 64 << 20  # bytes of repairs at hand
# What a rank puts in place between two steps, beside serving: some milliseconds of copying, and of dispatching.
_PART_BYTES, _PART_SLOTS = 64 << 20, 16
# Seconds, see Cluster.halt_s. Handing a step over takes some milliseconds, but where a program runs for the first time:
# then the device is given its code, which took up to 0.5 s on a GPU that four ranks share.
_HALT = 1.0


@dataclass(frozen=True)
class Cluster:
    rules: Rules
    limits: Limits  # of one rank
    num_experts: int
    start: Mapping[str, Any]  # of every engine's first command: config, path, load_format, cache, timeout
    repairs: Repairs | None = None
    # Slots, their ranks, the load [layers, experts] or None, and the imbalance to leave → better slots, or the same.
    rebalance: Callable[[Slots, Sequence[int], np.ndarray | None, float], Slots] = lambda slots, *_: slots
    policy: Policy = Policy()
    service: str = "serving.jax_service"  # modules; tests have others
    engine: str = "serving.engine_process"
    service_host: str = "127.0.0.1"  # of this machine, as engines on others can reach it
    halt_s: float = 0.0  # that the fence of a lost rank waits for the survivors, see serving.fences
    max_tokens: int = 1 << 22  # of the prompts and outputs of all requests that are open
    max_wait: float = 10.0  # seconds that a new one may have to wait for its turn, as far as can be said
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


class Repairs:
    """placement.repair, with the answers for the losses of any one or two hosts worked out before they happen, as far
    as they fit a bound: with a thousand hosts these would be half a million."""

    def __init__(self, hosts: Sequence[str], num_experts: int) -> None:
        self._hosts, self._num_experts = hosts, num_experts
        self._slots = b""  # of the epoch that serves: for others nothing is kept
        self._known: dict[tuple[int, ...], Slots | None] = {}
        self._coming: Iterator[tuple[int, ...]] = iter(())
        self._serving: Slots | None = None

    def __call__(self, slots: Slots, ranks: Sequence[int]) -> Slots | None:
        known = self._known if slots is self._serving or slots.tobytes() == self._slots else {}
        key = tuple(ranks)
        return known[key] if key in known else placement.repair(slots, ranks, self._hosts, self._num_experts)

    def expect(self, slots: Slots, ranks: Sequence[int]) -> None:
        """`ranks` serve now, with these slots. What was worked out for others is forgotten."""
        self._known.clear()
        self._serving, self._slots = slots, slots.tobytes()
        hosts = sorted({self._hosts[r] for r in ranks})
        losses = chain.from_iterable(combinations(hosts, count) for count in (1, 2) if count < len(hosts))
        self._coming = (tuple(r for r in sorted(ranks) if self._hosts[r] not in lost) for lost in losses)

    def work(self) -> None:
        """One answer more; milliseconds at most. To be called now and then."""
        if self._serving is not None and (len(self._known) + 1) * len(self._slots) <= _KEPT:
            ranks = next(self._coming, None)
            if ranks is not None:
                self._known[ranks] = self(self._serving, ranks)


def sizes_after(hosts: Sequence[str], lost: int) -> set[int]:
    """How many ranks can be left when so many hosts are lost, whichever they are. hosts: the label of each rank."""
    return {len(hosts) - size for size in _sums(tuple(sorted(Counter(hosts).values())), lost)}


@lru_cache
def _sums(sizes: tuple[int, ...], count: int) -> frozenset[int]:
    """What any `count` of these add up to."""
    sums = [frozenset({0}), *[frozenset[int]()] * count]  # of 0 to `count` of those seen so far
    for size in sizes:
        sums = [sums[0], *(a | {n + size for n in b} for a, b in zip(sums[1:], sums, strict=False))]
    return sums[count]


def make_cluster(
    path: Path,
    hosts: Sequence[str],
    platform: Platform,
    load_format: Any,
    cache: Path | None,
    startup_timeout: float,
    times: Mapping[str, float] | None = None,
    rebalance_above: float = Policy.above,
    **options: Any,
) -> tuple[Cluster, ModelConfig, EngineConfig]:
    """hosts: the label of each rank. times: fields of membership.Rules. rebalance_above: as Policy.above. options:
    fields of EngineConfig; each expert is on two hosts by default. Raises CheckpointError and ConfigError."""
    model = open_checkpoint(path, load_format).config
    if rebalance_above != 0 and not rebalance_above >= 1:
        raise ConfigError(f"rebalance_above: found {rebalance_above}, expected 0 (never) or at least 1 (even)")
    if options.get("replication") is None:
        options["replication"] = min(2, len(set(hosts)))
    config = engine_config(model, len(hosts), platform, **options)
    shape = model.num_moe_layers, model.num_experts, config.slots_for(model.num_experts)
    try:
        scatter = placement.choose_scatter(model.num_experts, hosts, shape[2], config.replication)
        _plan(*shape, hosts, range(len(hosts)), config.replication, scatter)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    repairs = Repairs(hosts, model.num_experts)

    def plan(ranks: Sequence[int]) -> Slots | None:
        """As much of the promise as these ranks can keep; None when they cannot hold every expert even once."""
        for replication in range(min(config.replication, len({hosts[r] for r in ranks})), 0, -1):
            try:
                return _plan(*shape, hosts, ranks, replication, scatter)
            except ValueError:
                continue
        return None

    def restore(slots: Slots, ranks: Sequence[int]) -> Slots:
        return placement.restore(slots, ranks, hosts, model.num_experts, config.replication)

    def rebalance(slots: Slots, ranks: Sequence[int], load: np.ndarray | None, within: float) -> Slots:
        if load is not None:
            return placement.rebalance(slots, ranks, hosts, model.num_experts, config.replication, load, within)
        wanted = plan(ranks)
        return slots if wanted is None else keep_in_place(slots, wanted)

    policy = Policy(above=rebalance_above)
    expert = 3 * model.hidden_size * model.moe_intermediate_size * (4 if config.dtype == "float32" else 2)  # bytes
    rules = Rules(
        len(hosts),
        tuple(hosts),
        plan,
        repairs,
        restore,
        partial(placement.part, most=max(1, min(_PART_SLOTS, _PART_BYTES // expert))),
        orders="any" if platform == "cpu" else "sorted",
        **{"ready_timeout_s": startup_timeout, "join_timeout_s": startup_timeout, **(times or {})},
    )
    start = {
        "config": asdict(config),
        "path": str(Path(path).resolve()),
        "load_format": load_format,
        "cache": None if cache is None else str(cache),
        "timeout": startup_timeout,
    }
    halt_s = 0.0 if platform == "cpu" else _HALT
    rest = start, repairs, rebalance, policy
    return Cluster(rules, Limits.of(config), model.num_experts, *rest, halt_s=halt_s), model, config


def keep_in_place(held: Slots, wanted: Slots) -> Slots:
    """`wanted`, with each rank's slots of a layer in such an order that what it holds already stays where it is."""
    result = wanted.copy()
    for layer, rank in np.ndindex(wanted.shape[:2]):
        before, rest = held[layer, rank], list(wanted[layer, rank])
        row = np.full(len(before), -2, np.int32)
        for i, expert in enumerate(before):
            if expert in rest:
                rest.remove(expert)
                row[i] = expert
        row[row == -2] = rest
        result[layer, rank] = row
    return result


def _plan(
    layers: int,
    experts: int,
    slots: int,
    hosts: Sequence[str],
    ranks: Sequence[int],
    replication: int,
    scatter: int | None,
) -> Slots:
    """placement.plan for some of the ranks, in an array for all."""
    placed = np.full((layers, len(hosts), slots), -1, np.int32)
    names = [hosts[r] for r in ranks]
    placed[:, list(ranks)] = placement.plan(layers, experts, names, slots, replication, scatter=scatter)
    return placed
