"""From loads and hosts to a placement that keeps the promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax.placement.board import (
    INFINITY,
    Board,
    live_rows,
    number_hosts,
    replicas,
    shares_of,
    slot_load,
    whole,
)

_LAYERS_TRIED, _HOSTS_TRIED = 8, 64  # to choose a width; layers are alike
_ROUNDS = 32  # of rebalancing: at most so many replicas more in a layer
_LESS = 0.01  # of the mean load, that the most loaded rank must lose for more moves to be worth it


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
    host, capacity = number_hosts(hosts, slots)
    _check_promise(num_layers, num_experts, capacity, slots, replication)
    if scatter is not None and scatter < replication - 1:
        raise ValueError(f"scatter: found {scatter}, expected at least replication - 1 = {replication - 1}")
    cells = _cells(num_experts, capacity, replication, scatter)
    shares = shares_of(load, num_layers, num_experts)
    return _place(shares, host, slots, replication, *(np.tile(a, (num_layers, 1)) for a in cells))


def _place(
    shares: np.ndarray, host: np.ndarray, slots: int, replication: int, cells: np.ndarray, quota: np.ndarray
) -> np.ndarray:
    """A placement [layers, ranks, slots]. cells [layers, hosts] and quota [layers, cells]: as `_cells`, of each."""
    count = count_replicas(shares, len(host) * slots, replication, len(host))
    placed, kept = _deal(shares, count, cells, quota, host, slots, replication)
    if not kept.all():  # replicas beyond the promise took the room of promised ones: hosts differ in size, or cells
        again = ~kept
        each, promised = (shares / count * replication)[again], np.full_like(count, replication)[again]
        placed[again] = _deal(each, promised, cells[again], quota[again], host, slots, replication)[0]
    board = Board.of(placed, host, shares.shape[1])
    fill(board, shares)
    balance(board, shares, replication, cells)
    fill(board, shares)  # a swap may have put an expert on the last host without it, so that it may be twice on one
    return board.placed


def choose_scatter(
    num_experts: int,
    hosts: Sequence[str],
    slots: int,
    replication: int,
    load: np.ndarray | None = None,
    uneven: float = 0.0075,
    after_loss: float = 0.25,
) -> int | None:
    """The narrowest scatter that `plan` need not pay for with its balance: what else survives is the most that can.

    The narrower, the fewer sets of `replication` hosts share an expert, and the fewer losses beyond the promise are
    fatal. Allowed is at most `uneven` more imbalance than with None, and `after_loss` more once any one host is lost,
    in the mean (0.01: one percent). load [layers, experts], of which eight layers are looked at; None: equal.
    Returns None, all hosts, where nothing narrower is allowed, and beyond 64 hosts, where trying takes too long.
    Raises as `plan`.
    """
    host, capacity = number_hosts(hosts, slots)
    number = len(capacity)
    if replication < 2 or not replication < number <= _HOSTS_TRIED:
        return None
    layers = _LAYERS_TRIED if load is None else min(len(load), _LAYERS_TRIED)
    _check_promise(layers, num_experts, capacity, slots, replication)
    # All widths at once, each as so many layers more.
    widths = [None, *(replication - 1 << i for i in range(8) if replication - 1 << i < number // 2)]
    cells, quota = zip(*(_cells(num_experts, capacity, replication, width) for width in widths), strict=True)
    quota = [np.pad(q, (0, max(map(len, quota)) - len(q))) for q in quota]
    tried = None if load is None else load[np.linspace(0, len(load) - 1, layers).astype(int)]
    shares = np.tile(shares_of(tried, layers, num_experts), (len(widths), 1))
    placed = _place(shares, host, slots, replication, *(np.repeat(a, layers, axis=0) for a in (cells, quota)))
    now, then = (x.reshape(len(widths), layers).mean(1) for x in _unevenness_after_losses(placed, shares, host))
    good = (now <= now[0] * (1 + uneven)) & (then <= then[0] * (1 + after_loss))
    good[0] = not good[1:].any()
    return widths[int(good.argmax())]


def _unevenness_after_losses(placed: np.ndarray, shares: np.ndarray, host: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most loaded rank's load over the mean rank's, and the mean of that over the losses of each host [layers]."""
    board = Board.of(placed, host, shares.shape[1])
    held = np.insert(board.held[..., :-1], 0, 0, axis=1)  # by the lost host; the first stands for none
    each = np.zeros((*held.shape[:2], shares.shape[1] + 1))
    each[..., :-1] = shares[:, None] / np.maximum(held.sum(1)[:, None] - held, 1)
    layers, lost = np.arange(len(placed))[:, None, None], np.arange(held.shape[1])[:, None]
    total = each[layers[..., None], lost[..., None], placed[:, None]].sum(3)  # [layers, lost, ranks]
    live = host != lost - 1
    total *= live
    uneven = total.max(2) / (total.sum(2) / live.sum(1))
    return uneven[:, 0], uneven[:, 1:].mean(1)


def rebalance(
    slots: np.ndarray,
    ranks: Sequence[int],
    hosts: Sequence[str],
    num_experts: int,
    replication: int,
    load: np.ndarray,
    within: float = 1.2,
) -> np.ndarray:
    """The placement with a new load [layers, experts] and few moves. Same shape; rows of ranks not in `ranks` are -1.

    In each layer whose most loaded rank has more than `within` times the mean, loaded ranks swap replicas with idle
    ones. Where that is not enough, the expert with the most load per replica gets another one, in the place of an
    expert that is on more hosts than promised and has less load per replica even then. No expert comes to be on fewer
    hosts than it is and than `replication`. A layer for which all that does not help comes back as it was. Scatter is
    not considered. A fresh `plan` is more even, and moves nearly everything.
    """
    live, placed, host = live_rows(slots, ranks, hosts)
    shares = shares_of(load, len(slots), num_experts)
    board = Board.of(placed, host, num_experts)
    cells = np.zeros(board.held.shape[:2], np.int64)
    best, lowest = placed.copy(), _most(placed, shares) - _LESS / max(len(live), 1)
    for _ in range(_ROUNDS if len(live) else 0):
        balance(board, shares, replication, cells, within)
        most = _most(placed, shares)
        better = most < lowest
        best[better], lowest = placed[better], np.where(better, most - _LESS / len(live), lowest)
        if not _add_replicas(board, shares, replication, within / len(live)):
            break
    return whole(slots, live, best)


def _most(placed: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Load of the most loaded rank [layers]."""
    return slot_load(placed, shares).sum(2).max(1, initial=0)


def _add_replicas(board: Board, shares: np.ndarray, replication: int, most: float) -> bool:
    """One more replica of the hottest expert of each layer where a rank has more than `most`. Whether any was added."""
    placed, num_experts = board.placed, shares.shape[1]
    count = np.maximum(replicas(placed, num_experts), 1)
    total = slot_load(placed, shares).sum(2)
    layer = np.flatnonzero(total.max(1) > most)
    if not len(layer):
        return False
    each = shares / count
    hot = each[layer].argmax(1)
    fewer = np.append(shares / np.maximum(count - 1, 0.5), np.zeros((len(shares), 1)), axis=1)
    after = fewer[layer[:, None, None], placed[layer]]  # of the expert there, per replica, without this one
    may = (board.spare(layer) >= replication) & (board.held[layer[:, None], board.host, hot[:, None]] == 0)[..., None]
    may &= after < each[layer, hot][:, None, None]
    own = each[layer[:, None, None], np.minimum(placed[layer], num_experts - 1)] * (placed[layer] >= 0)
    cost = np.where(may, total[layer][..., None] - own + after, INFINITY).reshape(len(layer), -1)
    fits = cost.min(1) < INFINITY
    board.put(layer[fits], cost.argmin(1)[fits], hot[fits].astype(np.int32))
    return bool(fits.any())


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


def _cells(
    num_experts: int, capacity: np.ndarray, replication: int, scatter: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each host's cell, and how many experts each cell gets, for the narrowest cells in which the promise fits."""
    if scatter is None or replication == 1:
        return np.zeros(len(capacity), np.int64), np.array([num_experts])
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
    # One by one to the cell that is the least full then.
    full = experts[1:] / np.bincount(cells, capacity)[:, None]
    full[experts[1:] > most[:, None]] = INFINITY
    order = np.argsort(full, axis=None, kind="stable")[:num_experts]
    return cells, np.bincount(order // num_experts, minlength=len(most))


def count_replicas(shares: np.ndarray, slots: int, replication: int, most: int) -> np.ndarray:
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
    cells: np.ndarray,
    quota: np.ndarray,
    host: np.ndarray,
    slots: int,
    replication: int,
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
    weights = np.take_along_axis(each, experts, 1)
    copies = np.arange(experts.size) - np.repeat(np.cumsum(count) - count, count)
    copies = copies.reshape(experts.shape)
    first, bound = (copies == 0).T, (copies < replication).T
    # The other ranks of rank k's host, filled up with the column `ranks`, which is no rank.
    mates = np.full((ranks, size.max() - 1), ranks)
    for k in range(ranks):
        mates[k, : size[host[k]] - 1] = np.setdiff1d(np.flatnonzero(host == host[k]), k)
    placed, kept = np.full((num_layers, ranks, slots), -1, np.int32), np.ones(num_layers, bool)
    filled = np.zeros((num_layers, ranks), np.int64)
    # The best rank has the lowest level: most room on its host, then on itself, then the least load, at most 1/2.
    level = np.append(-(size[host] * slots * (slots + 1.0) + slots), INFINITY) + np.zeros((num_layers, 1))
    taken = np.zeros_like(level)  # TAKEN for each replica of the expert on the rank's host, infinite on its own rank
    TAKEN = 1e9
    cell, left = np.append(cells[:, host], np.full((num_layers, 1), -1), axis=1), quota.copy()
    inside = cell[:, None] == np.arange(left.shape[1])[:, None]  # [layers, cells, ranks + 1]
    away = np.where(inside, 0, INFINITY)
    shut = np.where((inside & (left == 0)[..., None]).any(1), INFINITY, 0)  # cells that are full
    fence = np.zeros_like(level)  # infinite where the expert's cell is not
    key = np.empty_like(level)
    chance, tie = np.random.default_rng(0), np.zeros(0)
    layers = np.arange(num_layers)
    for j, (expert, weight, is_first, is_bound) in enumerate(zip(experts.T, weights.T, first, bound, strict=True)):
        if j % ranks == 0:
            tie = chance.random((num_layers, ranks + 1)) / 2
        taken[is_first] = 0
        np.add(level, taken, out=key)
        drawn = is_bound & ~is_first
        if drawn.any():
            key += tie * drawn[:, None]
        if left.shape[1] > 1:
            np.copyto(fence, shut, where=is_first[:, None])
            fence[~is_bound] = 0
            key += fence
        rank = key.argmin(1)
        found = key[layers, rank]
        row, begins = layers, is_first
        if not (good := found < TAKEN / 2).all():
            kept &= good | ~is_bound
            # Twice on a host once it is on all of them.
            good |= (taken[:, :-1] > 0).all(1) & (found < INFINITY)
            row, rank, expert, weight, begins = layers[good], rank[good], expert[good], weight[good], is_first[good]
        if left.shape[1] > 1 and begins.any():
            at, own = cell[row, rank][begins], row[begins]
            fence[own] = away[own, at]
            left[own, at] -= 1
            over = left[own, at] == 0
            shut[own[over]] += np.where(inside[own[over], at[over]], INFINITY, 0)
        now = filled[row, rank]
        placed[row, rank, now] = expert
        filled[row, rank] = now + 1
        if mates.size:
            taken[row[:, None], mates[rank]] += TAKEN
            level[row[:, None], mates[rank]] += slots + 1
        taken[row, rank] = INFINITY
        level[row, rank] += np.where(now < slots - 1, slots + 2 + weight / 2, INFINITY)
    return placed, kept


def fill(board: Board, shares: np.ndarray) -> None:
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
        fill(board, shares)


def balance(board: Board, shares: np.ndarray, replication: int, cells: np.ndarray, within: float = 1.001) -> None:
    """Swaps replicas until the most loaded rank of each layer has at most `within` times the mean, or no longer gets
    there.

    Loaded ranks are paired with idle ones, all pairs of all layers at once, and each pair swaps the two slots that come
    nearest to halving its difference. A swap puts no expert on a host that has it, and none on another cell's host out
    of a cell where it is on no more hosts than promised.
    """
    placed, host, held = board.placed, board.host, board.held
    num_layers, ranks, slots = placed.shape
    cell = cells[:, host]
    pairs = ranks // 2
    weight = slot_load(placed, shares).astype(np.float32)
    home = _homes(board, replication, cells)
    mean = weight.sum((1, 2)) / ranks
    best, patience = np.full(num_layers, INFINITY), np.zeros(num_layers)
    for turn in range(60 if pairs else 0):
        total = weight.sum(2)
        most = total.max(1)
        patience = np.where(most < best * 0.999, 6, patience - 1)
        best = np.where(patience == 6, most, best)
        active = np.flatnonzero((most > mean * within) & (patience > 0))
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
            may_a &= (home_a < 0) | (home_a == cell[layer, b][..., None])
            may_b &= (home_b < 0) | (home_b == cell[layer, a][..., None])
        off = weight[layer, a][..., :, None] - weight[layer, b][..., None, :]
        off -= half[..., None, None]
        np.abs(off, out=off)
        may_a &= (total[layer, a] > mean[layer] * within)[..., None]
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


def _homes(board: Board, replication: int, cells: np.ndarray) -> np.ndarray | None:
    """The cell that each slot's replica must not leave [layers, ranks, slots], -1 where it may; None if all may."""
    if not cells.any():
        return None
    cell = cells[:, board.host]
    inside = np.zeros((*board.on.shape, cells.max() + 1), np.int16)  # hosts of the cell that have the expert
    layer, on, expert = np.nonzero(board.held)
    np.add.at(inside, (layer, expert, cells[layer, on]), np.int16(1))
    layer = np.arange(len(cells))[:, None, None]
    bound = inside[layer, board.placed, cell[..., None]] >= replication
    return np.where(bound, cell[..., None], -1)
