"""What our placements are compared with: DeepSeek's EPLB, from its description (github.com/deepseek-ai/EPLB)."""

from __future__ import annotations

import numpy as np


def eplb(load: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """A placement [layers, ranks, slots] by the idea of EPLB, without groups of experts. load [layers, experts].

    Every expert has one replica; each further slot goes to the expert whose replicas carry the most. Replicas then go,
    the heaviest first, to the rank with the least load that still has a slot. Nothing keeps replicas of one expert
    apart, and nothing makes an expert have two.
    Raises ValueError when there are fewer slots than experts.
    """
    num_layers, num_experts = load.shape
    if ranks * slots < num_experts:
        raise ValueError(f"slots: found {ranks * slots} in all, {slots} a rank, expected at least {num_experts}")
    layers = np.arange(num_layers)
    count = np.ones(load.shape)
    replica = np.tile(np.arange(num_experts), (num_layers, 1))
    for _ in range(ranks * slots - num_experts):
        expert = (load / count).argmax(1)
        count[layers, expert] += 1
        replica = np.column_stack([replica, expert])
    weight = np.take_along_axis(load / count, replica, 1)
    placed = np.full((num_layers, ranks, slots), -1, np.int32)
    total, filled = np.zeros((num_layers, ranks)), np.zeros((num_layers, ranks), np.int64)
    for i in np.argsort(-weight, axis=1, kind="stable").T:
        rank = np.where(filled < slots, total, np.inf).argmin(1)
        placed[layers, rank, filled[layers, rank]] = replica[layers, i]
        total[layers, rank] += weight[layers, i]
        filled[layers, rank] += 1
    return placed
