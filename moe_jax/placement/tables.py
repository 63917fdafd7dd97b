"""From a placement to what the compiled step is given: primaries and the routing table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class _Replicas(NamedTuple):
    """Every replica, sorted by layer, expert and slot."""

    expert: np.ndarray  # layer * experts + expert
    slot: np.ndarray  # counted over all ranks
    nth: np.ndarray  # among the replicas of its expert
    number: np.ndarray  # of replicas of each expert [layers, experts]

    @staticmethod
    def of(placed: np.ndarray, num_experts: int) -> _Replicas:
        small = np.int16 if num_experts < 2**15 else np.int32  # numpy's stable sort of 16 bits is a radix sort
        flat = placed.reshape(len(placed), -1).astype(small)
        order = np.argsort(flat, axis=1, kind="stable")
        sorted_ = np.take_along_axis(flat, order, 1)
        layer, place = np.nonzero(sorted_ >= 0)
        expert = layer * num_experts + sorted_[layer, place]
        count = np.bincount(expert, minlength=len(placed) * num_experts)
        nth = np.arange(len(expert)) - (np.cumsum(count) - count)[expert]
        return _Replicas(expert, order[layer, place], nth, count.reshape(len(placed), num_experts))


def primaries(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """The global slot (mesh position * slots a rank + slot) of each expert's primary, int32 [layers, experts].

    slots [layers, mesh size, slots a rank], rows in mesh order. Decode reads every expert it hits at its primary, so
    the most primaries on one rank are as few as any choice allows. -1 where an expert has no replica.
    """
    return _primaries(slots, _Replicas.of(slots, num_experts))


def routing(slots: np.ndarray, num_experts: int, max_replicas: int) -> np.ndarray:
    """The routing table [layers, experts, max_replicas] int32: global slots, primary first, -1 where there are fewer.

    slots [layers, mesh size, slots a rank], rows in mesh order; a global slot is mesh position * slots a rank + slot.
    Replicas beyond max_replicas are left out, so that the shape, and what was compiled for it, never changes.
    """
    if max_replicas < 1:
        raise ValueError(f"max_replicas: found {max_replicas}, expected at least 1")
    all_ = _Replicas.of(slots, num_experts)
    primary = _primaries(slots, all_).ravel()[all_.expert]
    number = np.where(all_.slot == primary, 0, all_.nth + (all_.slot < primary))  # the others keep their order
    table = np.full((all_.number.size, max_replicas), -1, np.int32)
    kept = number < max_replicas
    table[all_.expert[kept], number[kept]] = all_.slot[kept]
    return table.reshape(*all_.number.shape, max_replicas)


def _primaries(slots: np.ndarray, all_: _Replicas) -> np.ndarray:
    num_layers, ranks, width = slots.shape
    num_experts = all_.number.shape[1]
    at = all_.expert // num_experts * ranks + all_.slot // width  # layer * ranks + rank
    chosen = np.append(_first_choice(all_, at, ranks), num_layers * ranks)
    keys = np.where(slots < 0, all_.number.size, slots + np.arange(num_layers)[:, None, None] * num_experts)
    _even_out(chosen, keys.reshape(num_layers * ranks, width), -(-(all_.number > 0).sum(1) // ranks), ranks)
    primary = np.full(all_.number.size, -1, np.int32)
    found = np.flatnonzero(at == chosen[all_.expert])[::-1]  # of two replicas on one rank, the first
    primary[all_.expert[found]] = all_.slot[found]
    return primary.reshape(all_.number.shape)


def _first_choice(all_: _Replicas, at: np.ndarray, ranks: int) -> np.ndarray:
    """layer * ranks + rank of each primary [layers * experts], layers * ranks where there is no replica.

    Experts with the fewest replicas come first. Each goes where the fewest primaries are, or are still to be expected
    if the experts to come chose at random.
    """
    num_layers, num_experts = all_.number.shape
    nowhere = num_layers * ranks
    layers = np.arange(num_layers)
    order = np.argsort(all_.number, axis=1, kind="stable")
    turn = np.empty_like(order)
    np.put_along_axis(turn, order, np.arange(num_experts)[None], 1)
    width = np.take_along_axis(all_.number, order, 1).max(0, initial=1)
    candidates = np.full((num_experts, num_layers, width.max(initial=1)), nowhere)
    candidates[turn.ravel()[all_.expert], all_.expert // num_experts, all_.nth] = at
    chance = 1 / np.maximum(all_.number, 1)
    expected = np.bincount(at, chance.ravel()[all_.expert], nowhere + 1).astype(np.float64)
    chance = np.take_along_axis(chance, order, 1).T[..., None].copy()
    chosen = np.empty((num_experts, num_layers), np.int64)
    for i in range(num_experts):
        expected[nowhere] = np.inf
        candidate = candidates[i, :, : width[i]]
        left = expected.take(candidate)
        left -= chance[i]
        expected[candidate] = left
        chosen[i] = best = candidate[layers, left.argmin(1)]
        expected[best] += 1
    return np.take_along_axis(chosen.T, turn, 1).ravel()


def _even_out(chosen: np.ndarray, keys: np.ndarray, goal: np.ndarray, ranks: int) -> None:
    """Moves primaries along paths of ranks, in place, until the most on one rank are as few as possible.

    chosen [layers * experts + 1] and keys [layers * ranks, slots] name each other: the rank of an expert's primary, the
    experts on a rank, each with its layer; the last of either stands for none. goal [layers]: the most primaries that a
    rank should have. If no path leads from a rank above it to one below it, all replicas of the primaries on the ranks
    within reach lie on ranks within reach, which have more than `goal` each on average: no choice does better, and the
    goal is raised (semi-matchings: Harvey, Ladner, Lovász and Tamir, J. Algorithms 2006).
    """
    load = np.bincount(chosen, minlength=len(keys) + 1)[:-1]
    root, step, via, last = (np.zeros(len(keys) + 1, np.int64) for _ in range(4))
    while True:
        above = load > np.repeat(goal, ranks)
        active = np.repeat(above.reshape(-1, ranks).any(1), ranks)
        if not active.any():
            return
        # Trees that lead to the ranks below the goal, grown by one link at a time: from a rank, `via` may go to `step`.
        fresh = np.flatnonzero(active & (load < np.repeat(goal, ranks)))
        root[:-1] = -1
        root[fresh] = fresh
        source = np.flatnonzero(above)
        while len(fresh) and (root[source] < 0).any():
            expert = keys[fresh].ravel()
            rank = chosen[expert]
            new = np.flatnonzero(root[rank] < 0)
            last[rank[new]] = new
            new = new[last[rank[new]] == new]  # one link from each rank
            rank, to = rank[new], fresh[new // keys.shape[1]]
            via[rank], step[rank], root[rank] = expert[new], to, root[to]
            fresh = rank
        reached = root[source] >= 0
        goal[np.unique(source[~reached] // ranks)] += 1
        source = source[reached]
        last[root[source]] = source
        source = source[last[root[source]] == source]  # one path to each root, so that no two share a rank
        load[source] -= 1
        load[root[source]] += 1
        while len(source):
            chosen[via[source]] = step[source]
            source = step[source]
            source = source[root[source] != source]
