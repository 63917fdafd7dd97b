"""Small jitted functions that loading parameters takes, and how they are called.

Callers take a `Call`: `direct`, or `Executables.call`, by which their programs are kept and a start compiles none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Call = Callable[..., jax.Array]
"""(function, device, *arguments, **static) -> the function's one result, on the device."""


def direct(function: Any, device: jax.Device, *arguments: Any, **static: Any) -> jax.Array:
    return function(*(jax.device_put(a, device) for a in arguments), **static)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def filled(value: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(value.astype(dtype), shape)


@jax.jit
def copied(array: jax.Array) -> jax.Array:
    """On the device; the original may be donated to what comes next."""
    return jnp.copy(array)


@partial(jax.jit, donate_argnums=0)
def set_row(stack: jax.Array, row: jax.Array, at: jax.Array) -> jax.Array:
    """stack [*leading, *row.shape], donated, with `row` at `at` int32 [leading axes]."""
    leading = stack.ndim - row.ndim
    starts = [at[i] for i in range(leading)] + [0] * row.ndim
    return jax.lax.dynamic_update_slice(stack, row.reshape((1,) * leading + row.shape), starts)
