"""The experts' feed-forward on Hopper, rows to rows: sort, copy, two grouped GEMMs, and the weighted sum back.

What XLA is given holds no loop whose length is data: counts stay on the device, and kernels read them there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import tuning
from moe_jax.kernels.decode import assign, can_assign
from moe_jax.kernels.grouped_gemm import SMS, dequantise, from_blocks, grouped_gemm, swiglu
from moe_jax.kernels.routing import assign_rows, combine, cut_tiles, padded_rows, permute


def configs(
    groups: int, hidden: int, inner: int, rows: int, weight_bytes: int = 2
) -> tuple[tuning.Config, tuning.Config]:
    """How the two GEMMs are run when about so many rows are spread over all groups."""
    each = max(1, rows // groups)
    up = tuning.Shape(groups, hidden, 2 * inner, each, True, weight_bytes)
    down = tuning.Shape(groups, inner, hidden, each, False, weight_bytes)
    return tuning.best(up), tuning.best(down)


def hopper_ffn(
    x: jax.Array,
    slot: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    share: float = 1.0,
    scales: tuple[jax.Array, jax.Array] | None = None,
    residual: jax.Array | None = None,
    *,
    sms: int = SMS,
    interpret: Any = None,
) -> jax.Array:
    """[M, H]: the sum over c of weights[m, c] times SwiGLU of slot[m, c] applied to x[m]; -1 adds nothing. `residual`,
    if there is one, is added to it.

    x [M, H] bfloat16; slot [M, C] int32 in -1..S-1; weights [M, C]; gate_up and down of all layers, [L, S, H, 2 I] and
    [L, S, I, H] as `grouped_gemm.to_blocks` gives them; layer [] int32. `share` is what fraction of the pairs is
    expected to have a slot here: with the shapes it decides how the GEMMs are run, never what comes out. With `scales`,
    of gate_up and of down as `grouped_gemm.scales_to_blocks` gives them, weights are float8_e4m3fn.
    Raises ValueError for sizes that are not multiples of 64.
    """
    m, choices = slot.shape
    groups, hidden = gate_up.shape[1], gate_up.shape[3] * 64
    inner = down.shape[3] * 64
    first, second = configs(groups, hidden, inner, round(m * choices * share), gate_up.dtype.itemsize)
    up_scales, down_scales = scales or (None, None)
    if first.block_m == second.block_m and can_assign(slot.size, groups):
        place, up = assign(slot, groups, first.block_m, interpret=interpret is not None)
        back = up
    else:
        place, sizes = assign_rows(slot, groups)
        up, back = (cut_tiles(sizes, slot.size, c.block_m) for c in (first, second))
    h = permute(x, place, padded_rows(slot.size, groups), interpret=interpret)
    h = grouped_gemm(h, gate_up, up, layer, first, True, up_scales, sms=sms, interpret=interpret)
    y = grouped_gemm(h, down, back, layer, second, False, down_scales, sms=sms, interpret=interpret)
    return combine(y, place, weights, residual, interpret=interpret)


def hopper_ffn_reference(
    x: jax.Array,
    slot: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    share: float = 1.0,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The same, every slot for every row; float32."""
    del share
    blocks = [gate_up[layer], down[layer]]
    if scales is not None:
        blocks = [dequantise(b, s[layer]) for b, s in zip(blocks, scales, strict=True)]
    w_in, w_out = from_blocks(blocks[0], True), from_blocks(blocks[1], False)
    f32 = [a.astype(jnp.float32) for a in (x, w_in, w_out)]
    h = swiglu(jnp.einsum("mh,shi->msi", f32[0], f32[1], precision="highest"))
    y = jnp.einsum("msi,sih->msh", h, f32[2], precision="highest")
    chosen = jnp.take_along_axis(y, jnp.maximum(slot, 0)[..., None], axis=1)
    return (jnp.where(slot >= 0, weights, 0)[..., None] * chosen).sum(1)
