"""What slots must hold after ranks were lost, or came back, with as little moved as can be."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from moe_jax.placement.board import INFINITY, Board, live_rows, replicas, shares_of, whole
from moe_jax.placement.planning import fill


def repair(slots: np.ndarray, ranks: Sequence[int], hosts: Sequence[str], num_experts: int) -> np.ndarray | None:
    """What the slots must hold so that `ranks`, the live ones, have every expert. Same shape; other ranks' rows are -1.

    Experts without a live replica go into empty slots, then into slots of the experts on the most live hosts; nothing
    else moves. The order of `ranks` does not matter. None when the live slots are fewer than the experts.
    """
    live, placed, host = live_rows(slots, ranks, hosts)
    if len(live) * slots.shape[2] < num_experts:
        return None
    lost = replicas(placed, num_experts) == 0
    if lost.any():
        board = Board.of(placed, host, num_experts)
        while len(layer := np.flatnonzero(lost.any(1))):
            expert = lost[layer].argmax(1)
            lost[layer, expert] = False
            score = board.spare(layer) - _fraction(board.given[layer])[..., None]  # spread, because loading takes time
            board.put(layer, score.reshape(len(layer), -1).argmax(1), expert)
    return whole(slots, live, placed)


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
    live, placed, host = live_rows(slots, ranks, hosts)
    shares = shares_of(load, len(slots), num_experts)
    cold = np.zeros((len(slots), num_experts + 1))
    if load is not None:
        cold[:, :-1] = 1 - shares / shares.max(1, keepdims=True)
    board = Board.of(placed, host, num_experts)
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
    fill(board, shares)
    return whole(slots, live, placed)


def part(slots: np.ndarray, goal: np.ndarray, most: int) -> np.ndarray:
    """`slots` with what `goal` changes in the first layers that differ: in as many as have no rank load more than
    `most` slots, and in one at least. What is promised of both holds of each part, because layers share nothing."""
    changed = ((goal != slots) & (goal >= 0)).sum(2)  # [layers, ranks]
    differs = (goal != slots).any((1, 2))
    take = differs & ((np.cumsum(changed, axis=0) <= most).all(1) | (np.cumsum(differs) == 1))
    return np.where(take[:, None, None], goal, slots)


def _fraction(given: np.ndarray) -> np.ndarray:
    return given / (given.max(initial=0) + 1)


def _chain(board: Board, layer: int, free: np.ndarray, expert: int) -> list[tuple[int, int]]:
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
