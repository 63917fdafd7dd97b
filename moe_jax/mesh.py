"""The mesh of an epoch: which devices form the axis `expert`, in which order, and how their buffers become one array.

A rank's arrays have the same shape in every mesh (the same slots, the same pages), so a new mesh is a new label on old
buffers: `assemble` moves nothing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.moe import AXIS
from moe_jax.params import describe

SHARDED = P(AXIS)  # leading axis: what each rank has its own of
STACKED = P(None, AXIS)  # second axis, behind the layers: slots and pages
REPLICATED = P()


@dataclass(frozen=True)
class ExpertMesh:
    devices: tuple[jax.Device, ...]  # one a rank, in mesh order

    @cached_property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), (AXIS,))

    @property
    def size(self) -> int:
        return len(self.devices)

    @cached_property
    def local(self) -> tuple[int, ...]:
        """Mesh positions of this process's ranks."""
        return tuple(i for i, d in enumerate(self.devices) if d.process_index == jax.process_index())

    @property
    def is_local(self) -> bool:
        """Whether all ranks are this process's, so that nobody else need agree."""
        return len(self.local) == self.size

    def assemble(self, shards: list[jax.Array], spec: P) -> jax.Array:
        """One global array of the local ranks' buffers, in order of `local`."""
        shape = list(shards[0].shape)
        if AXIS in spec:
            shape[list(spec).index(AXIS)] *= self.size
        return jax.make_array_from_single_device_arrays(tuple(shape), NamedSharding(self.mesh, spec), shards)

    def put(self, arrays: list[np.ndarray], spec: P) -> jax.Array:
        """Send one numpy array to each local rank."""
        return self.assemble(
            [jax.device_put(a, self.devices[i]) for a, i in zip(arrays, self.local, strict=True)], spec
        )

    def shards(self, array: jax.Array) -> list[jax.Array]:
        """The local ranks' buffers, in order of `local`."""
        by_device = {s.device: s.data for s in array.addressable_shards}
        return [by_device[self.devices[i]] for i in self.local]


def param_specs(c: ModelConfig) -> dict[str, Any]:
    """The PartitionSpec of each parameter."""
    is_param = lambda p: hasattr(p, "expert")  # noqa: E731
    return jax.tree.map(lambda p: STACKED if p.expert else REPLICATED, describe(c), is_leaf=is_param)


def primary_slots(num_experts: int, ranks: int, slots: int) -> np.ndarray:
    """[ranks, slots] int32: the expert in each slot, every expert once and then again until the slots are full.

    Copies of an expert lie on different ranks wherever there are as many ranks as copies: rank r's slots continue
    where rank r-1's ended. Raises ValueError when the slots are too few.
    """
    if ranks * slots < num_experts:
        raise ValueError(f"{ranks} ranks of {slots} slots cannot hold {num_experts} experts")
    return (np.arange(ranks * slots, dtype=np.int32) % num_experts).reshape(ranks, slots)


def place_experts(c: ModelConfig, ranks: int, slots: int) -> np.ndarray:
    """[ranks, layers with experts, slots] int32: `primary_slots`, the same in every layer."""
    return np.stack([primary_slots(c.num_experts, ranks, slots)] * c.num_moe_layers, axis=1)


def routing_table(slot_experts: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, R] int32 of global slots, the primary first, -1 where an expert has fewer. slot_experts [ranks, slots].

    Primaries are spread, so that decode uses the whole mesh: no expert has a copy on a rank with two primaries fewer
    than its primary's rank.
    """
    ranks, slots = slot_experts.shape
    flat = slot_experts.reshape(-1)
    found = [np.flatnonzero(flat == e).tolist() for e in range(num_experts)]
    count = np.zeros(ranks, np.int32)
    for own in found:
        count[own[0] // slots] += 1
    moved = True
    while moved:  # each move lowers the sum of squared counts, so this ends
        moved = False
        for own in found:
            best = min(own, key=lambda slot: count[slot // slots])
            if count[best // slots] + 2 <= count[own[0] // slots]:
                count[own[0] // slots] -= 1
                count[best // slots] += 1
                own.remove(best)
                own.insert(0, best)
                moved = True
    table = np.full((num_experts, max(len(own) for own in found)), -1, np.int32)
    for e, own in enumerate(found):
        table[e, : len(own)] = own
    return table
