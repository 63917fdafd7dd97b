"""Which slots hold which experts: plans, routing tables, repairs after a loss, and what a placement survives.

Pure functions over numpy; no JAX, no I/O, nothing random that a second call would not repeat. A placement is an int32
array [layers, ranks, slots] of logical experts, -1 where a slot is empty or its rank is gone. `hosts` names the failure
domain of every rank, in the order of the placement's rows.

The promise: with replication r every expert has replicas on at least r hosts, so any r - 1 lost hosts leave every
expert alive. Load decides how many replicas beyond the promise an expert gets, never whether it keeps it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import comb
from typing import NamedTuple

import numpy as np

INFINITY = np.inf
MOST_SETS = 50_000  # sets of lost hosts that `fatal_probability` still enumerates


@dataclass
class _Board:
    """Slots that are being changed, and which hosts have which experts, kept in step."""

    placed: np.ndarray  # [layers, ranks, slots]
    host: np.ndarray  # number of each rank's host [ranks]
    held: np.ndarray  # replicas on each host, int16 [layers, hosts, experts + 1]; the last column, expert -1, stays 0
    on: np.ndarray  # hosts that have the expert [layers, experts + 1]; the last column is more than there are hosts
    given: np.ndarray  # slots changed on each rank [layers, ranks]

    @staticmethod
    def of(placed: np.ndarray, host: np.ndarray, num_experts: int) -> _Board:
        held = np.zeros((len(placed), host.max(initial=-1) + 1, num_experts + 1), np.int16)
        layer, rank, slot = np.nonzero(placed >= 0)
        np.add.at(held, (layer, host[rank], placed[layer, rank, slot]), np.int16(1))
        on = (held > 0).sum(1)
        on[:, -1] = held.shape[1] + 1
        return _Board(placed, host, held, on, np.zeros(placed.shape[:2], np.int64))

    def put(self, layer: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> None:
        """expert[i] into slot[i] (counted over all ranks) of layer[i]; no layer has an expert come or go twice."""
        rank, place = np.divmod(slot, self.placed.shape[2])
        host, old = self.host[rank], self.placed[layer, rank, place]
        self.held[layer, host, old] -= 1
        self.on[layer, old] -= self.held[layer, host, old] == 0
        self.held[layer, host, expert] += 1
        self.on[layer, expert] += self.held[layer, host, expert] == 1
        self.held[layer, host, -1] = 0
        self.on[layer, -1] = self.held.shape[1] + 1
        self.placed[layer, rank, place] = expert
        self.given[layer, rank] += 1

    def spare(self, layer: np.ndarray) -> np.ndarray:
        """On how many hosts each slot's expert is without that slot [len(layer), ranks, slots]; the most if empty."""
        expert, layer = self.placed[layer], layer[:, None, None]
        return self.on[layer, expert] - (self.held[layer, self.host[:, None], expert] == 1)


# Planning ------------------------------------------------------------------------------------------------------------


def plan(
    num_layers: int,
    num_experts: int,
    hosts: Sequence[str],
    slots: int,
    replication: int,
    load: np.ndarray | None = None,
    scatter: int | None = None,
) -> np.ndarray:
    """A placement [layers, len(hosts), slots] that keeps the promise and balances load over the ranks.

    load [layers, experts], tokens or any unit, None for uniform. Slots beyond the promise go one by one to the expert
    with the most load per replica, as in EPLB (github.com/deepseek-ai/EPLB). No expert is twice on one rank, nor twice
    on one host before it is on all hosts; a slot stays empty only where every expert would break that.

    scatter: with about how many other hosts a host shares its experts; None for all of them. Few make few sets of r
    hosts whose loss is fatal, many spread a lost host's load (copysets: Cidon et al., USENIX ATC 2013). Hosts are cut
    into cells of at least scatter + 1, as narrow as slots allow, and the r promised replicas of an expert share a cell.
    Replicas beyond the promise go anywhere: they make no set fatal.

    Raises ValueError when the promise cannot be kept, naming what it lacks.
    """
    host, capacity = _hosts(hosts, slots)
    _check_promise(num_layers, num_experts, capacity, slots, replication)
    shares = _shares(load, num_layers, num_experts)
    cells, quota = np.zeros(len(capacity), np.int64), np.array([num_experts])
    if scatter is not None and scatter < replication - 1:
        raise ValueError(f"scatter: found {scatter}, expected at least replication - 1 = {replication - 1}")
    if scatter is not None and replication > 1:
        cells, quota = _cells(num_experts, capacity, replication, scatter)
    count = _count_replicas(shares, len(host) * slots, replication, len(host))
    placed, kept = _deal(shares, count, host, slots, replication, cells, quota)
    if not kept.all():  # replicas beyond the promise took the room of promised ones: hosts differ in size, or cells
        promised = np.full_like(count, replication)
        each = shares / count
        placed[~kept], _ = _deal((each * replication)[~kept], promised[~kept], host, slots, replication, cells, quota)
    board = _Board.of(placed, host, num_experts)
    _fill(board, shares)
    _balance(board, shares, replication, cells)
    _fill(board, shares)  # a swap may have put an expert on the last host without it, so that it may be twice on one
    return board.placed


def _hosts(hosts: Sequence[str] | np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each rank's host [ranks], and how many slots each host has [hosts]."""
    host = np.unique(np.asarray(hosts, dtype=str), return_inverse=True)[1]
    return host, np.bincount(host) * slots


def _check_promise(num_layers: int, num_experts: int, capacity: np.ndarray, slots: int, replication: int) -> None:
    sizes = {"num_layers": num_layers, "num_experts": num_experts, "slots": slots, "replication": replication}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    if len(capacity) < replication:
        raise ValueError(
            f"hosts: found {len(capacity)}, expected at least replication, {replication}: add hosts or promise less"
        )
    needed = num_experts * replication
    if capacity.sum() < needed:
        raise ValueError(
            f"slots: found {capacity.sum()} in all, {slots} a rank, expected at least {needed}, {num_experts} experts "
            f"* replication {replication}: raise slots or promise less"
        )
    # A host can keep at most one promised replica of each expert, and that much is also enough: fill one host after the
    # other with experts 0, 1, … E-1, 0, 1, …; none sees an expert twice.
    useful = np.minimum(capacity, num_experts).sum()
    if useful < needed:
        raise ValueError(
            f"hosts: found room for {useful} replicas on distinct hosts, whose slots are {capacity.tolist()}, expected "
            f"at least {needed}, {num_experts} experts * replication {replication}: raise slots, or spread the ranks "
            f"more evenly over hosts"
        )


def _shares(load: np.ndarray | None, num_layers: int, num_experts: int) -> np.ndarray:
    """Each expert's share of its layer's load [layers, experts], none quite zero."""
    load = np.ones((num_layers, num_experts)) if load is None else np.asarray(load, np.float64)
    if load.shape != (num_layers, num_experts):
        raise ValueError(f"load: found shape {load.shape}, expected (layers, experts) = {(num_layers, num_experts)}")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError("load: found negative or non-finite values, expected finite values >= 0")
    total = load.sum(1, keepdims=True)
    load = load / np.where(total > 0, total, 1) + 1e-9 / num_experts
    return load / load.sum(1, keepdims=True)


def _cells(num_experts: int, capacity: np.ndarray, replication: int, scatter: int) -> tuple[np.ndarray, np.ndarray]:
    """Each host's cell, and how many experts each cell gets, for the narrowest cells in which the promise fits."""
    by_size, experts = np.argsort(-capacity, kind="stable"), np.arange(num_experts + 1)
    number = max(len(capacity) // (scatter + 1), 1) + 1
    most, members = np.zeros(0, np.int64), []
    while most.sum() < num_experts:  # one cell of all hosts is enough
        number -= 1
        members = np.array_split(by_size, number)
        fits = [np.minimum(capacity[m, None], experts).sum(0) >= replication * experts for m in members]
        most = np.array([experts[f].max() for f in fits])
    cells = np.empty(len(capacity), np.int64)
    for i, m in enumerate(members):
        cells[m] = i
    room, quota = np.bincount(cells, capacity), np.zeros_like(most)
    for _ in range(num_experts):
        quota[np.where(quota < most, (quota + 1) / room, INFINITY).argmin()] += 1
    return cells, quota


def _count_replicas(shares: np.ndarray, slots: int, replication: int, most: int) -> np.ndarray:
    """Replicas [layers, experts]: the promise, then each further slot to the most load per replica. At most `most`."""
    layers, count = np.arange(len(shares)), np.full(shares.shape, replication)
    each = shares / replication
    for _ in range(min(slots, shares.shape[1] * most) - shares.shape[1] * replication):
        expert = each.argmax(1)
        count[layers, expert] += 1
        now = count[layers, expert]
        each[layers, expert] = np.where(now < most, shares[layers, expert] / now, -1)
    return count


def _deal(
    shares: np.ndarray,
    count: np.ndarray,
    host: np.ndarray,
    slots: int,
    replication: int,
    cells: np.ndarray,
    quota: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A placement with `count` replicas of each expert, and whether it keeps the promise in each layer.

    Experts come in order of load per replica, with all their replicas. Each replica goes to the host with the most room
    among those without the expert, which places them all if that can be done, in whatever order experts come (as in
    the greedy proof of the Gale-Ryser theorem). Ties go to the least loaded rank, but for promised replicas after the
    first to chance: equal loads would make the same pair of ranks share one expert after another. Replicas that find no
    place are left out.
    """
    num_layers, ranks, size = len(shares), len(host), np.bincount(host)
    each = shares / count
    order = np.argsort(-each, axis=1, kind="stable")
    count = np.take_along_axis(count, order, 1).ravel()
    experts = np.repeat(order.ravel(), count).reshape(num_layers, -1)  # each layer has as many replicas
    copies = np.arange(experts.size) - np.repeat(np.cumsum(count) - count, count)
    copies = copies.reshape(experts.shape)
    # The ranks of rank k's host, filled up with the column `ranks`, which is no rank.
    mates = np.full((ranks, size.max()), ranks)
    for k in range(ranks):
        mates[k, : size[host[k]]] = np.flatnonzero(host == host[k])
    placed, kept = np.full((num_layers, ranks, slots), -1, np.int32), np.ones(num_layers, bool)
    free = np.full((num_layers, ranks), slots)
    # The best rank has the lowest level: most room on its host, then on itself, then the least load, at most 1/2.
    level = np.append(-(size[host] * slots * (slots + 1.0) + slots), INFINITY) + np.zeros((num_layers, 1))
    taken = np.zeros_like(level)  # TAKEN for each replica of the expert on the rank's host, infinite on its own rank
    TAKEN = 1e9
    cell, left = np.append(cells[host], -1), np.tile(quota, (num_layers, 1))
    home = np.zeros(num_layers, np.int64)
    chance, tie = np.random.default_rng(0), np.zeros(0)
    layers = np.arange(num_layers)
    for j, (expert, copy) in enumerate(zip(experts.T, copies.T, strict=True)):
        if j % ranks == 0:
            tie = chance.random((num_layers, ranks + 1)) / 2
        taken[copy == 0] = 0
        key = level + taken
        key += tie * ((copy > 0) & (copy < replication))[:, None]
        if len(quota) > 1:
            bound = (copy < replication)[:, None]
            key[bound & np.where((copy == 0)[:, None], left[:, cell] <= 0, cell != home[:, None])] = INFINITY
        rank = key.argmin(1)
        good = key[layers, rank] < TAKEN / 2
        row = layers
        if not good.all():
            kept &= good | (copy >= replication)
            # Twice on a host once it is on all of them.
            good |= (taken[:, :-1] > 0).all(1) & (key[layers, rank] < INFINITY)
            row, rank, expert, copy = layers[good], rank[good], expert[good], copy[good]
        if len(quota) > 1:
            home[row] = np.where(copy == 0, cell[rank], home[row])
            left[row, cell[rank]] -= copy == 0
        placed[row, rank, slots - free[row, rank]] = expert
        free[row, rank] -= 1
        taken[row[:, None], mates[rank]] += TAKEN
        taken[row, rank] = INFINITY
        level[row[:, None], mates[rank]] += slots + 1
        level[row, rank] += np.where(free[row, rank] > 0, 1 + each[row, expert] / 2, INFINITY)
    return placed, kept


def _fill(board: _Board, shares: np.ndarray) -> None:
    """Gives each empty slot the expert with the most load per replica of those that may go there."""
    num_layers, _, slots = board.placed.shape
    count = replicas(board.placed, shares.shape[1])
    room = (board.placed < 0).sum(2)
    filled = False
    while len(layer := np.flatnonzero(room.any(1))):
        rank = room[layer].argmax(1)
        own = board.placed[layer, rank]
        on_rank = np.zeros((len(layer), shares.shape[1] + 1), bool)
        on_rank[np.arange(len(layer))[:, None], own] = True
        everywhere = board.on[layer, :-1] == board.held.shape[1]
        may = np.where(everywhere, ~on_rank[:, :-1], board.held[layer, board.host[rank], :-1] == 0)
        each = np.where(may, shares[layer] / np.maximum(count[layer], 0.5), -1)
        expert = each.argmax(1)
        fits = may.any(1)
        room[layer, rank] = np.where(fits, room[layer, rank] - 1, 0)
        layer, expert, slot = layer[fits], expert[fits], (rank * slots + (own < 0).argmax(1))[fits]
        board.put(layer, slot, expert)
        count[layer, expert] += 1
        filled |= len(layer) > 0
    if filled and (board.placed < 0).any():  # an expert that is now on all hosts may go where none could
        _fill(board, shares)


def _balance(board: _Board, shares: np.ndarray, replication: int, cells: np.ndarray) -> None:
    """Swaps replicas until the most loaded rank of each layer is within 0.1 % of the mean, or no longer gets there.

    Loaded ranks are paired with idle ones, all pairs of all layers at once, and each pair swaps the two slots that come
    nearest to halving its difference. A swap puts no expert on a host that has it, and none on another cell's host out
    of a cell where it is on no more hosts than promised.
    """
    placed, host, held = board.placed, board.host, board.held
    num_layers, ranks, slots = placed.shape
    pairs = ranks // 2
    weight = _slot_load(placed, shares).astype(np.float32)
    home = _homes(board, replication, cells)
    mean = weight.sum((1, 2)) / ranks
    best, patience = np.full(num_layers, INFINITY), np.zeros(num_layers)
    for turn in range(60 if pairs else 0):
        total = weight.sum(2)
        most = total.max(1)
        patience = np.where(most < best * 0.999, 6, patience - 1)
        best = np.where(patience == 6, most, best)
        active = np.flatnonzero((most > mean * 1.001) & (patience > 0))
        if not len(active):
            break
        layer = active[:, None]
        order = np.argsort(total[active], axis=1)
        # Heaviest with lightest, and every other time with another of the light ones, so that none waits for a partner.
        a, b = order[:, ::-1][:, :pairs], np.roll(order[:, :pairs], turn % 2 * (turn // 2 + 1), axis=1)
        half = (total[layer, a] - total[layer, b]) / 2
        xa, xb = placed[layer, a], placed[layer, b]  # [active, pairs, slots]
        may_a = held[layer[..., None], host[b][..., None], xa] == 0
        may_b = held[layer[..., None], host[a][..., None], xb] == 0
        same = (host[a] == host[b])[..., None]
        if same.any():  # within a host an expert may change ranks unless the other rank has it
            twin = (xa[..., :, None] == xb[..., None, :]) & (xa >= 0)[..., None]
            may_a, may_b = np.where(same, ~twin.any(3), may_a), np.where(same, ~twin.any(2), may_b)
        if home is not None:
            home_a, home_b = home[layer, a], home[layer, b]
            may_a &= (home_a < 0) | (home_a == cells[host[b]][..., None])
            may_b &= (home_b < 0) | (home_b == cells[host[a]][..., None])
        off = weight[layer, a][..., :, None] - weight[layer, b][..., None, :]
        off -= half[..., None, None]
        np.abs(off, out=off)
        off[~(may_a[..., :, None] & may_b[..., None, :])] = INFINITY
        off = off.reshape(*a.shape, slots * slots)
        choice = off.argmin(2)
        row, pair = np.nonzero(np.take_along_axis(off, choice[..., None], 2)[..., 0] < half * (1 - 1e-6))
        layer, i, j = active[row], *np.divmod(choice[row, pair], slots)
        i, j = a[row, pair] * slots + i, b[row, pair] * slots + j
        flat = placed.reshape(num_layers, -1)
        x, y = flat[layer, i], flat[layer, j]
        # An expert moves once a turn: two of its replicas might otherwise meet on one host.
        first = np.full((num_layers, shares.shape[1] + 1), pairs)
        np.minimum.at(first, (layer, x), pair)
        np.minimum.at(first, (layer, y), pair)
        take = ((x < 0) | (first[layer, x] == pair)) & ((y < 0) | (first[layer, y] == pair))
        layer, i, j, x, y = (v[take] for v in (layer, i, j, x, y))
        board.put(layer, i, y)
        board.put(layer, j, x)
        for array in (weight,) if home is None else (weight, home):
            flat = array.reshape(num_layers, -1)
            flat[layer, i], flat[layer, j] = flat[layer, j], flat[layer, i]


def _homes(board: _Board, replication: int, cells: np.ndarray) -> np.ndarray | None:
    """The cell that each slot's replica must not leave [layers, ranks, slots], -1 where it may; None if all may."""
    if not cells.any():
        return None
    inside = np.stack([(board.held[:, cells == c] > 0).sum(1) for c in range(cells.max() + 1)], axis=1)
    cell = cells[board.host][:, None]
    bound = inside[np.arange(len(inside))[:, None, None], cell, board.placed] >= replication
    return np.where(bound, cell, -1)


def _slot_load(placed: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Load of every slot [layers, ranks, slots] when an expert's load is split evenly over its replicas."""
    each = np.zeros((len(shares), shares.shape[1] + 1))
    each[:, :-1] = shares / np.maximum(replicas(placed, shares.shape[1]), 1)
    return each[np.arange(len(shares))[:, None, None], placed]


# Routing -------------------------------------------------------------------------------------------------------------


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
        expected[nowhere] = INFINITY
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


# Losses --------------------------------------------------------------------------------------------------------------


def repair(slots: np.ndarray, ranks: Sequence[int], hosts: Sequence[str], num_experts: int) -> np.ndarray | None:
    """What the slots must hold so that `ranks`, the live ones, have every expert. Same shape; other ranks' rows are -1.

    Experts without a live replica go into empty slots, then into slots of the experts on the most live hosts; nothing
    else moves. The order of `ranks` does not matter. None when the live slots are fewer than the experts.
    """
    live, placed, host = _live(slots, ranks, hosts)
    if len(live) * slots.shape[2] < num_experts:
        return None
    lost = replicas(placed, num_experts) == 0
    if lost.any():
        board = _Board.of(placed, host, num_experts)
        while len(layer := np.flatnonzero(lost.any(1))):
            expert = lost[layer].argmax(1)
            lost[layer, expert] = False
            score = board.spare(layer) - _fraction(board.given[layer])[..., None]  # spread, because loading takes time
            board.put(layer, score.reshape(len(layer), -1).argmax(1), expert)
    return _whole(slots, live, placed)


def restore(
    slots: np.ndarray,
    ranks: Sequence[int],
    hosts: Sequence[str],
    num_experts: int,
    replication: int,
    load: np.ndarray | None = None,
) -> np.ndarray:
    """As much of the promise as the live slots allow, with few moves. Same shape; rows of ranks not in `ranks` are -1.

    An expert on fewer than `replication` hosts gets one more: an empty slot, a second replica's on one host, or that of
    an expert that is on more hosts even without it, on the most first, then (with load [layers, experts]) the coldest.
    If such slots are only on hosts that have it already, other experts make way, one move each. So the fewest hosts
    that any expert is on never fall, and where the promise can be kept it is. Slots that are still empty, such as a
    returned rank's, are filled as `plan` would. The input comes back when nothing improves. Scatter is not considered.
    """
    live, placed, host = _live(slots, ranks, hosts)
    shares = _shares(load, len(slots), num_experts)
    cold = np.zeros((len(slots), num_experts + 1))
    if load is not None:
        cold[:, :-1] = 1 - shares / shares.max(1, keepdims=True)
    board = _Board.of(placed, host, num_experts)
    goal = min(replication, board.held.shape[1])
    stuck = np.zeros((len(slots), num_experts), bool)
    while len(layer := np.flatnonzero((needy := (board.on[:, :-1] < goal) & ~stuck).any(1))):
        expert = np.where(needy[layer], board.on[layer, :-1] - shares[layer] / 2, INFINITY).argmin(1)
        has, spare = board.on[layer, expert], board.spare(layer)
        # A slot is free if its expert stays on more hosts, or on as many: then there is another on the same host.
        free = (spare > has[:, None, None]) | (spare == board.on[layer[:, None, None], placed[layer]])
        score = spare + cold[layer[:, None, None], placed[layer]] / 2 - _fraction(board.given[layer])[..., None] / 4
        score[~free | (board.held[layer[:, None], host, expert[:, None]] > 0)[..., None]] = -1
        score = score.reshape(len(layer), -1)
        fits = score.max(1) >= 0
        board.put(layer[fits], score.argmax(1)[fits], expert[fits])
        stuck[layer[fits]] = False
        stuck[layer[~free.any((1, 2))]] = True  # the layer's other experts would need no less
        for i in np.flatnonzero(free.any((1, 2)) & ~fits):
            writes = _chain(board, layer[i], free[i], expert[i])
            for slot, moved in writes:
                board.put(layer[i : i + 1], np.array([slot]), np.array([moved]))
            stuck[layer[i]] &= not writes
            stuck[layer[i], expert[i]] = not writes
    _fill(board, shares)
    return _whole(slots, live, placed)


def _fraction(given: np.ndarray) -> np.ndarray:
    return given / (given.max(initial=0) + 1)


def _live(slots: np.ndarray, ranks: Sequence[int], hosts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The live ranks in ascending order, a copy of their rows, and the number of each one's host."""
    live = np.unique(np.asarray(ranks, np.int64))
    if len(hosts) != slots.shape[1]:
        raise ValueError(f"hosts: found {len(hosts)}, expected one for each of the placement's {slots.shape[1]} ranks")
    if len(live) and not 0 <= live[0] <= live[-1] < slots.shape[1]:
        raise ValueError(f"ranks: found {live.tolist()}, expected numbers from 0 to {slots.shape[1] - 1}")
    return live, slots[:, live], _hosts(np.asarray(hosts, dtype=str)[live], slots.shape[2])[0]


def _whole(slots: np.ndarray, live: np.ndarray, placed: np.ndarray) -> np.ndarray:
    whole = np.full_like(slots, -1)
    whole[:, live] = placed
    return whole


def _chain(board: _Board, layer: int, free: np.ndarray, expert: int) -> list[tuple[int, int]]:
    """The fewest (slot, expert) writes, in order, that give `expert` one more host; [] if none do.

    free [ranks, slots]: what may be overwritten. Breadth first over hosts: an expert moves on to a host that lacks it,
    until one has a free slot (an augmenting path).
    """
    held, flat, free = board.held[layer], board.placed[layer].ravel(), free.ravel()
    host = np.repeat(board.host, board.placed.shape[2])
    came = {int(h): -1 for h in np.flatnonzero(held[:, expert] == 0)}  # host: the slot whose expert would move there
    queue = deque(came)
    while queue:
        own = np.flatnonzero(host == queue.popleft())
        if free[own].any():
            slot, writes = int(own[free[own].argmax()]), []
            while (source := came[int(host[slot])]) >= 0:
                writes.append((slot, int(flat[source])))
                slot = source
            return [*writes, (slot, int(expert))]
        lacks = held[:, flat[own]] == 0  # [hosts, slots of this host]
        for to in np.flatnonzero(lacks.any(1)).tolist():
            if to not in came:
                came[to] = int(own[lacks[to].argmax()])
                queue.append(to)
    return []


# Measures ------------------------------------------------------------------------------------------------------------


def replicas(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """Replicas of each expert, int64 [layers, experts]."""
    key = slots.reshape(len(slots), -1) + (np.arange(len(slots)) * (num_experts + 1) + 1)[:, None]
    count = np.bincount(key.ravel(), minlength=len(slots) * (num_experts + 1))
    return count.reshape(len(slots), num_experts + 1)[:, 1:]


def missing(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """The (layer, expert) pairs without a replica, int64 [pairs, 2], sorted."""
    return np.argwhere(replicas(slots, num_experts) == 0)


def moves(before: np.ndarray, after: np.ndarray) -> int:
    """How many slots must be loaded to get from one placement to another: those that get another expert."""
    return int(((after != before) & (after >= 0)).sum())


def survivable_host_losses(slots: np.ndarray, hosts: Sequence[str], num_experts: int) -> int:
    """The largest k such that any k lost hosts leave every expert alive; -1 when an expert is missing already."""
    host, capacity = _hosts(hosts, slots.shape[2])
    return int(_Board.of(slots, host, num_experts).on[:, :-1].min(initial=len(capacity))) - 1


def imbalance(slots: np.ndarray, ranks: Sequence[int], load: np.ndarray | None, num_experts: int) -> float:
    """The most loaded of `ranks` over their mean, averaged over layers; 1 is perfect.

    load [layers, experts], None for uniform; an expert's load is split evenly over its replicas on `ranks`, and counts
    nowhere when it has none.
    """
    placed = slots[:, np.asarray(ranks, np.int64)]
    total = _slot_load(placed, _shares(load, len(slots), num_experts)).sum(2)
    return float((total.max(1) / total.mean(1)).mean())


def imbalance_bound(ranks: int, slots: int, replication: int, load: np.ndarray) -> float:
    """What `imbalance` over all ranks cannot go below while the promise is kept, averaged over layers.

    load [layers, experts]. Some rank holds a replica of the expert with the most load per replica, however the slots
    beyond the promise are used. Where there are none, all its other slots hold replicas of other experts.
    """
    shares = _shares(load, *load.shape)
    hottest = (shares / _count_replicas(shares, ranks * slots, replication, ranks)).max(1)
    forced = slots - 1 if ranks * slots == shares.shape[1] * replication else 0
    coldest = np.sort(shares, axis=1)[:, :forced].sum(1) / replication
    return float(np.maximum((hottest + coldest) * ranks, 1).mean())


def fatal_probability(
    slots: np.ndarray, hosts: Sequence[str], num_experts: int, k: int, samples: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """The chance that losing k hosts, all sets of k alike, leaves an expert without a replica; its standard error.

    Exact, with error 0, while there are at most 50,000 such sets; otherwise an estimate from `samples` random ones.
    Pass only the rows and hosts of live ranks.
    """
    host, capacity = _hosts(hosts, slots.shape[2])
    number = len(capacity)
    if not 0 <= k <= number:
        raise ValueError(f"k: found {k}, expected 0 to {number}, the number of hosts")
    if exact := comb(number, k) <= MOST_SETS:
        lost = np.fromiter(chain.from_iterable(combinations(range(number), k)), np.int64).reshape(comb(number, k), k)
    else:
        lost = np.random.default_rng(seed).permuted(np.tile(np.arange(number), (samples, 1)), axis=1)[:, :k]
    gone = np.zeros((len(lost), number), bool)
    np.put_along_axis(gone, lost, True, 1)
    held = _Board.of(slots, host, num_experts).held[..., :-1] > 0
    copysets = np.unique(_words(held.transpose(0, 2, 1).reshape(-1, number)), axis=0)
    copysets = copysets[np.argsort(np.bitwise_count(copysets).sum(1), kind="stable")]  # the most easily lost first
    kept, fatal = ~_words(gone), 0
    for start in range(0, len(copysets), 64):
        dead = ((copysets[start : start + 64] & kept[:, None]) == 0).all(2).any(1)
        fatal += int(dead.sum())
        kept = kept[~dead]
    p = fatal / len(lost)
    return p, 0.0 if exact else float(np.sqrt(p * (1 - p) / len(lost)))


def _words(sets: np.ndarray) -> np.ndarray:
    """Sets as bits: bool [n, hosts] -> uint64 [n, ceil(hosts / 64)]."""
    padded = np.zeros((len(sets), -(-sets.shape[1] // 64) * 64), bool)
    padded[:, : sets.shape[1]] = sets
    return np.packbits(padded, axis=1).view(np.uint64)
