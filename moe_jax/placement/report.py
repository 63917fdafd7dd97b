"""What a placement is worth, in figures: for `moe-jax plan`, and beside those of another placement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from moe_jax.placement.board import number_hosts, replicas
from moe_jax.placement.measures import fatal_probability, imbalance, missing, moves, survivable_host_losses
from moe_jax.placement.repairing import repair, restore

SETS = 32  # of lost hosts that are tried for means; all of them where there are no more


@dataclass(frozen=True)
class LossReport:
    """What losing `lost` hosts, any set of so many alike, does. Means and worsts are over the sets tried."""

    lost: int
    fatal: tuple[float, float]  # the chance that an expert is left without a replica, and its standard error
    fatal_racks: tuple[float, float] | None  # the same for so many racks; None: no racks, or fewer
    imbalance: float  # over the ranks that are left, once every expert has a replica again: the mean, infinite if
    worst_imbalance: float  # too few slots are left
    loaded: float  # experts to load before serving goes on, all layers together: the mean
    worst_loaded: int
    unservable: float  # fraction of the sets that leave too few slots for all experts
    tried: int  # sets
    all_tried: bool


@dataclass(frozen=True)
class Report:
    survivable_host_losses: int
    survivable_rack_losses: int | None
    min_replicas: int
    single: int  # (layer, expert) pairs that are on one host only
    losses: tuple[LossReport, ...]  # "0 lost" first


@dataclass(frozen=True)
class Changes:
    """What becomes of the slots when these ranks are lost, and when they come back."""

    loaded: int  # slots, before serving goes on: experts that nobody holds
    restored: int  # in the background after it, so that the promise holds again
    imbalance: float  # over those left, then
    returned: int  # slots that the ranks load which come back, beside the others' work
    moved_by_return: int  # slots of the others that change once they are back
    survivable_host_losses: int  # once restored; -1: too few slots for all experts


def report(
    slots: np.ndarray,
    hosts: Sequence[str],
    num_experts: int,
    load: np.ndarray | None = None,
    losses: Sequence[int] = (1, 2),
    racks: Sequence[str] | None = None,
    seed: int = 0,
) -> Report:
    """Figures of a placement [layers, ranks, slots] before and after losses.

    load [layers, experts], None for uniform. losses: numbers of hosts, each at most those there are. racks: of each
    rank, a failure domain above its host. Raises ValueError for a loss of more hosts than there are.
    """
    names = sorted(set(hosts))
    by_rack = None if racks is None else list(racks)
    found = [_loss(slots, hosts, names, by_rack, num_experts, load, k, seed) for k in (0, *losses)]
    count = replicas(slots, num_experts)
    host = number_hosts(hosts, slots.shape[2])[0]
    on = np.zeros((len(names), *count.shape), bool)
    for rank, number in enumerate(host):
        layer, slot = np.nonzero(slots[:, rank] >= 0)
        on[number, layer, slots[layer, rank, slot]] = True
    return Report(
        survivable_host_losses(slots, hosts, num_experts),
        None if by_rack is None else survivable_host_losses(slots, by_rack, num_experts),
        int(count.min()),
        int((on.sum(0) == 1).sum()),
        tuple(found),
    )


def _loss(
    slots: np.ndarray,
    hosts: Sequence[str],
    names: list[str],
    racks: list[str] | None,
    num_experts: int,
    load: np.ndarray | None,
    k: int,
    seed: int,
) -> LossReport:
    fatal = fatal_probability(slots, hosts, num_experts, k)
    by_rack = None
    if racks is not None and k <= len(set(racks)):
        by_rack = fatal_probability(slots, racks, num_experts, k)
    uneven, loaded = [], []
    sets = list(_sets(names, k, seed))
    for lost in sets:
        ranks = [rank for rank, host in enumerate(hosts) if host not in lost]
        left = repair(slots, ranks, hosts, num_experts) if ranks else None
        if left is None:
            uneven.append(np.inf)
            continue
        loaded.append(len(missing(slots[:, ranks], num_experts)))
        uneven.append(imbalance(left, ranks, load, num_experts))
    return LossReport(
        k,
        fatal,
        by_rack,
        float(np.mean(uneven)),
        float(np.max(uneven)),
        float(np.mean(loaded)) if loaded else 0.0,
        max(loaded, default=0),
        1 - len(loaded) / len(sets),
        len(sets),
        len(sets) == comb(len(names), k),
    )


def _sets(names: list[str], k: int, seed: int) -> Iterator[frozenset[str]]:
    """All sets of k of the names, or SETS of them drawn at random."""
    if comb(len(names), k) <= SETS:
        yield from map(frozenset, combinations(names, k))
        return
    random = np.random.default_rng(seed)
    for _ in range(SETS):
        yield frozenset(random.permutation(names)[:k].tolist())


def changes(
    slots: np.ndarray,
    lost: Sequence[int],
    hosts: Sequence[str],
    num_experts: int,
    replication: int,
    load: np.ndarray | None = None,
) -> Changes:
    """What is moved when the ranks `lost` go, and when they return with what they had."""
    left = [rank for rank in range(slots.shape[1]) if rank not in lost]
    repaired = repair(slots, left, hosts, num_experts) if left else None
    if repaired is None:
        return Changes(0, 0, np.inf, 0, 0, -1)
    restored = restore(repaired, left, hosts, num_experts, replication, load)
    back = restored.copy()
    back[:, list(lost)] = slots[:, list(lost)]
    whole = restore(back, range(slots.shape[1]), hosts, num_experts, replication, load)
    return Changes(
        moves(slots[:, left], repaired[:, left]),
        moves(repaired, restored),
        imbalance(restored, left, load, num_experts),
        int((slots[:, list(lost)] >= 0).sum()),
        moves(back, whole),
        survivable_host_losses(restored[:, left], [hosts[rank] for rank in left], num_experts),
    )
