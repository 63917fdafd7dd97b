"""Row tiles: how a step's dense products come out the same, whatever else is in the step.

A matrix product's bits depend on how many rows it has, because libraries choose blocking and summation order by shape.
So in deterministic mode every product has `tile` rows in every bucket, and a step runs as many of them as it has
tokens for: the trip count is dynamic, so padding costs nothing and XLA can neither merge nor unroll them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def map_tiles(f: Callable[..., Any], tile: int | None, count: jax.Array, *rows: Any) -> Any:
    """Apply `f` to the first `count` tiles of `tile` rows; rows of the others come out as zeros.

    `rows` are pytrees of arrays [T, ...] with T a multiple of `tile`; `f` maps such rows of any number to a pytree of
    arrays [rows, ...], each row on its own. tile None: one call on all rows, the fastest on a GPU.
    """
    if tile is None:
        return f(*rows)

    def cut(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * tile, tile)

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((tile, *x.shape[1:]), x.dtype), rows)
    total = jax.tree.leaves(rows)[0].shape[0]
    out = jax.tree.map(lambda y: jnp.zeros((total, *y.shape[1:]), y.dtype), jax.eval_shape(f, *first))

    def body(i: jax.Array, out: Any) -> Any:
        y = f(*jax.tree.map(lambda x: cut(x, i), rows))
        return jax.tree.map(lambda o, part: lax.dynamic_update_slice_in_dim(o, part, i * tile, 0), out, y)

    return lax.fori_loop(0, count, body, out)
