"""The experts' feed-forward: each (token, choice) pair through the SwiGLU of its slot.

`expert_ffn` is the public function. The tiled version computes only the rows that are routed somewhere: pairs are
sorted by slot, and for each slot that was hit its weights are taken once and its rows go through in tiles of a fixed
number of rows, so that a pair's result has the same bits whatever else is in the batch. (`lax.ragged_dot` on CPU
expands to a masked product for every group: with 16 experts and 128 pairs it took 5.5 times as long as the tiles, with
32 larger experts 6.6 times; 2026-11-22, 2 cores, jax 0.10.2 and 0.11.2.)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.small import Call, direct


def prepare(weights: jax.Array, call: Call = direct) -> jax.Array:
    """Expert weights as the tiled version wants them, donated. On CPU bfloat16 becomes its bits in uint16: XLA there
    (seen in jax 0.10.2) would widen the whole stack in every step before it cuts a slot out, but leaves integers be."""
    device = next(iter(weights.devices()))
    return call(_to_bits, device, weights) if device.platform == "cpu" and weights.dtype == jnp.bfloat16 else weights


@partial(jax.jit, donate_argnums=0)
def _to_bits(weights: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(weights, jnp.uint16)


def prepared_dtype(dtype: np.dtype, platform: str) -> np.dtype:
    """The dtype that `prepare` gives."""
    return np.dtype(np.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else dtype


def widen(weights: jax.Array, dtype: Any) -> jax.Array:
    """Weights, or the bits of bfloat16 weights, in `dtype`; exact where dtype is float32."""
    if weights.dtype == jnp.uint16:
        weights = lax.bitcast_convert_type(weights.astype(jnp.uint32) << 16, jnp.float32)
    return weights.astype(dtype)


def expert_ffn(
    x: jax.Array, slot: jax.Array, gate_up: jax.Array, down: jax.Array, layer: jax.Array, tile: int
) -> jax.Array:
    """y[m, c] = SwiGLU of slot[m, c] of the layer applied to x[m]; zeros where slot is -1.

    x [M, H]; slot [M, C] int32 in -1..S-1; gate_up [L, S, H, 2 I], gates first; down [L, S, I, H]: all layers, because
    cutting one out would copy weights that nobody asked for; layer [] int32. Weights may be narrower than x. Returns
    [M, C, H] in x's dtype, which is also that of the products.
    """
    m, choices = slot.shape
    pairs, slots = m * choices, gate_up.shape[1]
    flat = slot.reshape(pairs)
    # One key holds slot and pair: a sort of plain integers, stable by construction.
    order = lax.sort(jnp.where(flat < 0, slots, flat) * pairs + jnp.arange(pairs, dtype=jnp.int32)) % pairs
    sizes = (flat[:, None] == jnp.arange(slots)).sum(0, dtype=jnp.int32)
    begin = jnp.cumsum(sizes) - sizes
    hit = jnp.nonzero(sizes, size=slots, fill_value=0)[0]
    token = jnp.pad(order // choices, (0, tile))
    inner = down.shape[2]

    def weights(stack: jax.Array, s: jax.Array) -> jax.Array:
        return widen(lax.dynamic_slice(stack, (layer, s, 0, 0), (1, 1, *stack.shape[2:]))[0, 0], x.dtype)

    def one_slot(h: jax.Array, out: jax.Array) -> jax.Array:
        s = hit[h]
        w_in, w_out = weights(gate_up, s), weights(down, s)

        def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
            row = begin[s] + i * tile
            a = x.at[lax.dynamic_slice(token, (row,), (tile,))].get(mode="promise_in_bounds") @ w_in
            y = (jax.nn.silu(a[:, :inner]) * a[:, inner:]) @ w_out
            # A last tile's surplus rows land on the next slot's, which is computed later.
            return lax.dynamic_update_slice(out, y, (row, 0))

        return lax.fori_loop(0, (sizes[s] + tile - 1) // tile, one_tile, out)

    y = lax.fori_loop(0, (sizes > 0).sum(), one_slot, jnp.zeros((pairs + tile, x.shape[1]), x.dtype))
    place = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    return jnp.where((flat >= 0)[:, None], y[place], 0).reshape(m, choices, -1)


def expert_ffn_reference(
    x: jax.Array, slot: jax.Array, gate_up: jax.Array, down: jax.Array, layer: jax.Array, tile: int = 0
) -> jax.Array:
    """Every slot for every row, then a choice: slow, and obviously right."""
    del tile
    gate_up, down = widen(gate_up[layer], x.dtype), widen(down[layer], x.dtype)
    inner = down.shape[1]
    a = jnp.einsum("mh,shi->msi", x, gate_up, precision="highest")
    y = jnp.einsum("msi,sih->msh", jax.nn.silu(a[..., :inner]) * a[..., inner:], down, precision="highest")
    return jnp.where((slot >= 0)[..., None], jnp.take_along_axis(y, jnp.maximum(slot, 0)[..., None], axis=1), 0)
