"""Sums and maxima in steps of 16 elements.

XLA on CPU rewrites a reduction of 32 elements or more as a tree of windows, and then has to write out whatever is
being reduced: a page's products, say, 64 kB instead of none. Cut by hand, the products stay in registers. The order is
fixed by the shape alone.
"""

import operator
from collections.abc import Callable
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

_STEP = 16


def _reduce(x: jax.Array, axis: int, whole: Callable[..., jax.Array], pair: Callable[..., jax.Array]) -> jax.Array:
    axis %= x.ndim
    n = x.shape[axis]
    step = next((d for d in range(min(_STEP, n), 1, -1) if n % d == 0), n)
    if step == n:
        return whole(x, axis)
    parts = whole(x.reshape(*x.shape[:axis], n // step, step, *x.shape[axis + 1 :]), axis + 1)
    if n // step > _STEP:
        return _reduce(lax.optimization_barrier(parts), axis, whole, pair)  # or XLA makes one reduction of both again
    return reduce(pair, (lax.index_in_dim(parts, i, axis, keepdims=False) for i in range(n // step)))


def ordered_sum(x: jax.Array, axis: int) -> jax.Array:
    return _reduce(x, axis, jnp.sum, operator.add)


def ordered_max(x: jax.Array, axis: int) -> jax.Array:
    return _reduce(x, axis, jnp.max, jnp.maximum)
