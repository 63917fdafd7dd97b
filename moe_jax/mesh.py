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
from moe_jax.distributed import make_global, put_global
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

    @cached_property
    def _shardings(self) -> dict[P, NamedSharding]:
        return {spec: NamedSharding(self.mesh, spec) for spec in (SHARDED, STACKED, REPLICATED)}

    def sharding(self, spec: P) -> NamedSharding:
        """Of SHARDED, STACKED or REPLICATED arrays."""
        return self._shardings[spec]

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

    def global_shape(self, shape: tuple[int, ...], spec: P) -> tuple[int, ...]:
        """Of the array whose shards have this shape."""
        if AXIS not in spec:
            return shape
        axis = spec.index(AXIS)
        return (*shape[:axis], shape[axis] * self.size, *shape[axis + 1 :])

    def assemble(self, shards: list[jax.Array], spec: P) -> jax.Array:
        """One global array of the local ranks' buffers, in order of `local`."""
        return make_global(self.global_shape(shards[0].shape, spec), self.sharding(spec), shards)

    def put(self, arrays: list[np.ndarray], spec: P) -> jax.Array:
        """Send one numpy array to each local rank."""
        shape = self.global_shape(arrays[0].shape, spec)
        return put_global(shape, self.sharding(spec), arrays, [self.devices[i] for i in self.local])

    def shards(self, array: jax.Array) -> list[jax.Array]:
        """The local ranks' buffers, in order of `local`."""
        by_device = {s.device: s.data for s in array.addressable_shards}
        return [by_device[self.devices[i]] for i in self.local]


def param_specs(c: ModelConfig) -> dict[str, Any]:
    """The PartitionSpec of each parameter."""
    is_param = lambda p: hasattr(p, "expert")  # noqa: E731
    return jax.tree.map(lambda p: STACKED if p.expert else REPLICATED, describe(c), is_leaf=is_param)
