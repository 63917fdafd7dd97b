"""What crosses the mesh for the experts, on virtual devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.mesh import ExpertMesh
from moe_jax.moe import AXIS, Dispatch


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_collective_gathers_all_bit_by_bit(dtype: str) -> None:
    ranks, rng = 4, np.random.default_rng(0)
    x = rng.integers(0, 1 << 16, (12, 8), np.uint16)  # every bit pattern, NaNs and -0 among them
    rows = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.bfloat16).astype(dtype)
    arrays = rows, jnp.asarray(rng.standard_normal((12, 3), np.float32)), jnp.asarray(rng.integers(-1, 300, (12, 3)))
    mesh = ExpertMesh(tuple(jax.devices()[:ranks])).mesh
    gather = partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec(), check_vma=False
    )(Dispatch(ranks).gather)
    compiled = jax.jit(gather).lower(*arrays).compile()
    assert (compiled.as_text() or "").count("all-gather(") == 1
    for found, given in zip(compiled(*arrays), arrays, strict=True):
        assert found.dtype == given.dtype and np.asarray(found).tobytes() == np.asarray(given).tobytes()
