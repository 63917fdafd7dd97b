"""Which incarnations form the mesh, and which experts they hold: what the membership decides, and all others go by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Slots = np.ndarray  # int32 [layers, num_ranks, S]: logical experts, -1: empty; rows of absent ranks are all -1


@dataclass(frozen=True, eq=False)
class Epoch:
    """Committed membership. Numbers only grow and none is used twice."""

    number: int
    generation: int
    order: tuple[int, ...]  # ranks in mesh order
    incarnations: tuple[int, ...]  # theirs
    nodes: tuple[int, ...]  # their node ids in the generation
    slots: Slots  # rows of ranks outside `order` are -1; read-only
