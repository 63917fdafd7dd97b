"""What a placement survives, and how even it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from math import comb

import numpy as np

from moe_jax.placement.board import Board, number_hosts, replicas, shares_of, slot_load
from moe_jax.placement.planning import count_replicas

MOST_SETS = 50_000  # sets of lost hosts that `fatal_probability` still enumerates


def missing(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """The (layer, expert) pairs without a replica, int64 [pairs, 2], sorted."""
    return np.argwhere(replicas(slots, num_experts) == 0)


def moves(before: np.ndarray, after: np.ndarray) -> int:
    """How many slots must be loaded to get from one placement to another: those that get another expert."""
    return int(((after != before) & (after >= 0)).sum())


def survivable_host_losses(slots: np.ndarray, hosts: Sequence[str], num_experts: int) -> int:
    """The largest k such that any k lost hosts leave every expert alive; -1 when an expert is missing already."""
    host, capacity = number_hosts(hosts, slots.shape[2])
    return int(Board.of(slots, host, num_experts).on[:, :-1].min(initial=len(capacity))) - 1


def imbalance(slots: np.ndarray, ranks: Sequence[int], load: np.ndarray | None, num_experts: int) -> float:
    """The most loaded of `ranks` over their mean, averaged over layers; 1 is perfect.

    load [layers, experts], None for uniform; an expert's load is split evenly over its replicas on `ranks`, and counts
    nowhere when it has none.
    """
    placed = slots[:, np.asarray(ranks, np.int64)]
    total = slot_load(placed, shares_of(load, len(slots), num_experts)).sum(2)
    most, mean = total.max(1), total.mean(1)
    return float(np.divide(most, mean, out=np.ones(len(mean)), where=mean > 0).mean())  # no load is evenly spread


def imbalance_bound(ranks: int, slots: int, replication: int, load: np.ndarray) -> float:
    """What `imbalance` over all ranks cannot go below while the promise is kept, averaged over layers.

    load [layers, experts]. Some rank holds a replica of the expert with the most load per replica, however the slots
    beyond the promise are used. Where there are none, all its other slots hold replicas of other experts.
    """
    shares = shares_of(load, *load.shape)
    hottest = (shares / count_replicas(shares, ranks * slots, replication, ranks)).max(1)
    forced = slots - 1 if ranks * slots == shares.shape[1] * replication else 0
    coldest = np.sort(shares, axis=1)[:, :forced].sum(1) / replication
    return float(np.maximum((hottest + coldest) * ranks, 1).mean())


def fatal_probability(
    slots: np.ndarray, hosts: Sequence[str], num_experts: int, k: int, samples: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """The chance that losing k hosts, all sets of k alike, leaves an expert without a replica; its standard error.

    Exact, with error 0, while there are at most 50,000 such sets; otherwise an estimate from `samples` random ones,
    whose error is above 0 even where all or none were fatal (Agresti and Coull, The American Statistician 1998).
    Pass only the rows and hosts of live ranks.
    """
    host, capacity = number_hosts(hosts, slots.shape[2])
    number = len(capacity)
    if not 0 <= k <= number:
        raise ValueError(f"k: found {k}, expected 0 to {number}, the number of hosts")
    if exact := comb(number, k) <= MOST_SETS:
        lost = np.fromiter(chain.from_iterable(combinations(range(number), k)), np.int64).reshape(comb(number, k), k)
    else:
        lost = np.random.default_rng(seed).permuted(np.tile(np.arange(number), (samples, 1)), axis=1)[:, :k]
    gone = np.zeros((len(lost), number), bool)
    np.put_along_axis(gone, lost, True, 1)
    held = Board.of(slots, host, num_experts).held[..., :-1] > 0
    copysets = np.unique(_words(held.transpose(0, 2, 1).reshape(-1, number)), axis=0)
    copysets = copysets[np.argsort(np.bitwise_count(copysets).sum(1), kind="stable")]  # the most easily lost first
    kept, fatal = ~_words(gone), 0
    for start in range(0, len(copysets), 64):
        dead = ((copysets[start : start + 64] & kept[:, None]) == 0).all(2).any(1)
        fatal += int(dead.sum())
        kept = kept[~dead]
    near = (fatal + 2) / (len(lost) + 4)
    return fatal / len(lost), 0.0 if exact else float(np.sqrt(near * (1 - near) / (len(lost) + 4)))


def _words(sets: np.ndarray) -> np.ndarray:
    """Sets as bits: bool [n, hosts] -> uint64 [n, ceil(hosts / 64)]."""
    padded = np.zeros((len(sets), -(-sets.shape[1] // 64) * 64), bool)
    padded[:, : sets.shape[1]] = sets
    return np.packbits(padded, axis=1).view(np.uint64)
