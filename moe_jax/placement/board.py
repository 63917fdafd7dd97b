"""Slots and hosts as arrays: what planning, repairing and measuring a placement have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INFINITY = np.inf


@dataclass
class Board:
    """Slots that are being changed, and which hosts have which experts, kept in step."""

    placed: np.ndarray  # [layers, ranks, slots]
    host: np.ndarray  # number of each rank's host [ranks]
    held: np.ndarray  # replicas on each host, int16 [layers, hosts, experts + 1]; the last column, expert -1, stays 0
    on: np.ndarray  # hosts that have the expert [layers, experts + 1]; the last column is more than there are hosts
    given: np.ndarray  # slots changed on each rank [layers, ranks]

    @staticmethod
    def of(placed: np.ndarray, host: np.ndarray, num_experts: int) -> Board:
        held = np.zeros((len(placed), host.max(initial=-1) + 1, num_experts + 1), np.int16)
        layer, rank, slot = np.nonzero(placed >= 0)
        np.add.at(held, (layer, host[rank], placed[layer, rank, slot]), np.int16(1))
        on = (held > 0).sum(1)
        on[:, -1] = held.shape[1] + 1
        return Board(placed, host, held, on, np.zeros(placed.shape[:2], np.int64))

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


def number_hosts(hosts: Sequence[str] | np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each rank's host [ranks], and how many slots each host has [hosts]."""
    host = np.unique(np.asarray(hosts, dtype=str), return_inverse=True)[1]
    return host, np.bincount(host) * slots


def shares_of(load: np.ndarray | None, num_layers: int, num_experts: int) -> np.ndarray:
    """Each expert's share of its layer's load [layers, experts], none quite zero."""
    load = np.ones((num_layers, num_experts)) if load is None else np.asarray(load, np.float64)
    if load.shape != (num_layers, num_experts):
        raise ValueError(f"load: found shape {load.shape}, expected (layers, experts) = {(num_layers, num_experts)}")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        raise ValueError("load: found negative or non-finite values, expected finite values >= 0")
    total = load.sum(1, keepdims=True)
    load = load / np.where(total > 0, total, 1) + 1e-9 / num_experts
    return load / load.sum(1, keepdims=True)


def replicas(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """Replicas of each expert, int64 [layers, experts]."""
    key = slots.reshape(len(slots), -1) + (np.arange(len(slots)) * (num_experts + 1) + 1)[:, None]
    count = np.bincount(key.ravel(), minlength=len(slots) * (num_experts + 1))
    return count.reshape(len(slots), num_experts + 1)[:, 1:]


def slot_load(placed: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Load of every slot [layers, ranks, slots] when an expert's load is split evenly over its replicas."""
    each = np.zeros((len(shares), shares.shape[1] + 1))
    each[:, :-1] = shares / np.maximum(replicas(placed, shares.shape[1]), 1)
    return each[np.arange(len(shares))[:, None, None], placed]


def live_rows(
    slots: np.ndarray, ranks: Sequence[int], hosts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The live ranks in ascending order, a copy of their rows, and the number of each one's host."""
    live = np.unique(np.asarray(ranks, np.int64))
    if len(hosts) != slots.shape[1]:
        raise ValueError(f"hosts: found {len(hosts)}, expected one for each of the placement's {slots.shape[1]} ranks")
    if len(live) and not 0 <= live[0] <= live[-1] < slots.shape[1]:
        raise ValueError(f"ranks: found {live.tolist()}, expected numbers from 0 to {slots.shape[1] - 1}")
    return live, slots[:, live], number_hosts(np.asarray(hosts, dtype=str)[live], slots.shape[2])[0]


def whole(slots: np.ndarray, live: np.ndarray, placed: np.ndarray) -> np.ndarray:
    whole = np.full_like(slots, -1)
    whole[:, live] = placed
    return whole
