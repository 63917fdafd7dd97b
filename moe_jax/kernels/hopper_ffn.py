"""The experts' feed-forward on Hopper, rows to rows: sort, copy, two grouped GEMMs, and the weighted sum back.

What XLA is given holds no loop whose length is data: counts stay on the device, and kernels read them there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import tuning
from moe_jax.kernels.grouped_gemm import SMS, from_blocks, grouped_gemm, swiglu
from moe_jax.kernels.routing import assign_rows, combine, cut_tiles, padded_rows, permute


def configs(groups: int, hidden: int, inner: int, rows: int) -> tuple[tuning.Config, tuning.Config]:
    """How the two GEMMs are run when about so many rows are spread over all groups."""
    each = max(1, rows // groups)
    up, down = tuning.Shape(groups, hidden, 2 * inner, each, True), tuning.Shape(groups, inner, hidden, each, False)
    return tuning.best(up), tuning.best(down)


def hopper_ffn(
    x: jax.Array,
    slot: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    share: float = 1.0,
    *,
    sms: int = SMS,
    interpret: Any = None,
) -> jax.Array:
    """[M, H]: the sum over c of weights[m, c] times SwiGLU of slot[m, c] applied to x[m]; -1 adds nothing.

    x [M, H] bfloat16; slot [M, C] int32 in -1..S-1; weights [M, C]; gate_up and down of all layers, [L, S, H, 2 I] and
    [L, S, I, H] as `grouped_gemm.to_blocks` gives them; layer [] int32. `share` is what fraction of the pairs is
    expected to have a slot here: with the shapes it decides how the GEMMs are run, never what comes out.
    Raises ValueError for sizes that are not multiples of 64.
    """
    m, choices = slot.shape
    groups, hidden = gate_up.shape[1], gate_up.shape[3] * 64
    inner = down.shape[3] * 64
    first, second = configs(groups, hidden, inner, round(m * choices * share))
    place, sizes = assign_rows(slot, groups)
    up, back = (cut_tiles(sizes, slot.size, c.block_m) for c in (first, second))
    h = permute(x, place, padded_rows(slot.size, groups), interpret=interpret)
    h = grouped_gemm(h, gate_up, up, layer, first, activate=True, sms=sms, interpret=interpret)
    y = grouped_gemm(h, down, back, layer, second, sms=sms, interpret=interpret)
    return combine(y, place, weights, interpret=interpret)


def hopper_ffn_reference(
    x: jax.Array,
    slot: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    share: float = 1.0,
) -> jax.Array:
    """The same, every slot for every row; float32."""
    del share
    w_in, w_out = from_blocks(gate_up[layer], True), from_blocks(down[layer], False)
    f32 = [a.astype(jnp.float32) for a in (x, w_in, w_out)]
    h = swiglu(jnp.einsum("mh,shi->msi", f32[0], f32[1], precision="highest"))
    y = jnp.einsum("msi,sih->msh", h, f32[2], precision="highest")
    chosen = jnp.take_along_axis(y, jnp.maximum(slot, 0)[..., None], axis=1)
    return (jnp.where(slot >= 0, weights, 0)[..., None] * chosen).sum(1)
