"""The mixture-of-experts layer: router, dispatch over the mesh, experts, combine.

Runs inside `shard_map`. `Dispatch` is the small interface behind which tokens reach the ranks that hold their experts;
the one here all-gathers the tokens, lets every rank compute what its slots are for, and reduce-scatters the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.config import ModelConfig
from moe_jax.kernels.expert_ffn import expert_ffn

AXIS = "expert"


def router_parts(router: jax.Array) -> jax.Array:
    """float32 [..., H, E] as the sum of three bfloat16 matrices, which hold all its bits, side by side."""
    parts, rest = [], router
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        # Without the barrier XLA would take the rounding for an identity (its excess precision).
        rest = rest - lax.optimization_barrier(parts[-1]).astype(jnp.float32)
    return jnp.concatenate(parts, axis=-1)


def router_logits(h: jax.Array, router: jax.Array) -> jax.Array:
    """h @ router in float32. bfloat16 rows meet `router_parts`: products are exact, as in float32, and a GPU's matrix
    units take a tenth of the time of its float32 units."""
    if h.dtype != jnp.bfloat16:
        return jnp.dot(h.astype(jnp.float32), router, precision="highest")
    each = jnp.dot(h, router, preferred_element_type=jnp.float32)
    high, middle, low = jnp.split(each, 3, axis=1)
    return low + middle + high


def route(c: ModelConfig, logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The chosen experts of each row, best first, and their weights: int32 and float32, both [rows, top_k].

    logits [rows, E] float32; bias [E]. Groups: DeepSeek-V2 section 2.2.1 and DeepSeek-V3 section 2.1.2.
    """
    scores = jax.nn.sigmoid(logits) if c.scoring == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if bias is None else scores + bias
    if c.num_groups > 1:
        grouped = choice.reshape(-1, c.num_groups, c.num_experts // c.num_groups)
        group = grouped.max(-1) if c.group_score == "max" else lax.top_k(grouped, 2)[0].sum(-1)
        best = lax.top_k(group, c.top_groups)[1]
        allowed = (best[..., None] == jnp.arange(c.num_groups)).any(-2)
        choice = jnp.where(jnp.repeat(allowed, c.num_experts // c.num_groups, axis=-1), choice, -jnp.inf)
    ids = lax.top_k(choice, c.top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if c.normalize_weights:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return ids, weights * c.routed_scale


def count_choices(counts: jax.Array, ids: jax.Array) -> jax.Array:
    """counts [L, E] int32 and how often each expert occurs in ids [L, rows, top_k], -1 where there is none.

    By comparing each with each, in one pass: adding up in place is slow where many rows choose few experts.
    """
    experts = jnp.arange(counts.shape[1], dtype=ids.dtype)
    return counts + (ids.reshape(len(ids), 1, -1) == experts[:, None]).sum(-1, dtype=counts.dtype)


def _from_words(words: jax.Array, like: jax.Array) -> jax.Array:
    """[M, ...] of the type and the trailing shape of `like`, of words [M, n] that hold its bits."""
    each = like.dtype.itemsize // words.dtype.itemsize
    shape = (len(words), *like.shape[1:], *([each] if each > 1 else []))
    return lax.bitcast_convert_type(words.reshape(shape), like.dtype)


@dataclass(frozen=True)
class Dispatch:
    """All-gather and reduce-scatter over the mesh axis. `ranks` is the size of the axis."""

    ranks: int

    def gather(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Each [T, ...] of this rank -> [ranks * T, ...]. By one collective: besides its launch each costs time when a
        rank is lost, for those in the queue wait in vain one after the other before they see that they are aborted."""
        if self.ranks == 1:
            return arrays
        word = jnp.dtype(f"uint{8 * min(a.dtype.itemsize for a in arrays)}")
        words = [lax.bitcast_convert_type(a, word).reshape(len(a), -1) for a in arrays]
        gathered = lax.all_gather(jnp.concatenate(words, axis=1), AXIS, tiled=True)
        ends = np.cumsum([w.shape[1] for w in words])[:-1].tolist()
        parts = jnp.split(gathered, ends, axis=1)
        return tuple(_from_words(part, a) for part, a in zip(parts, arrays, strict=True))

    def reduce(self, y: jax.Array) -> jax.Array:
        """The sum over ranks of [ranks * T, ...], this rank's [T, ...]."""
        return lax.psum_scatter(y, AXIS, tiled=True) if self.ranks > 1 else y


def choose_slots(ids: jax.Array, table: jax.Array, spread: bool) -> jax.Array:
    """Global slot of each choice, -1 where the row is padding (id -1).

    ids [M, C]; table [E, R] int32: the live slots of each expert, primary first, -1 where there are fewer. Decode reads
    each hit expert once, at its primary; with `spread`, which pays where arithmetic is the bound, rows take turns.
    """
    if not spread or table.shape[1] == 1:
        slot = table[jnp.maximum(ids, 0), 0]
    else:
        slots = table[jnp.maximum(ids, 0)]  # [M, C, R]
        turn = jnp.arange(ids.shape[0])[:, None] % jnp.maximum((slots >= 0).sum(-1), 1)
        slot = jnp.take_along_axis(slots, jnp.broadcast_to(turn, ids.shape)[..., None], axis=-1)[..., 0]
    return jnp.where(ids < 0, -1, slot)


def moe(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    table: jax.Array,
    dispatch: Dispatch,
    tile: int,
    spread: bool,
    deterministic: bool,
    residual: jax.Array,
    ffn: Callable[..., jax.Array] = expert_ffn,
    hopper: bool = False,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The weighted sum of each row's experts, and `residual` [T, H], [T, H].

    x [T, H]; ids, weights [T, C], ids -1 for padding; gate_up [L, S, H, 2 I], down [L, S, I, H] of this rank's S slots
    in all layers with experts, of which this is number `layer`; table [E, R] of global slots, mesh position * S + slot.
    Deterministic: each expert's output crosses the mesh on its own (adding the other ranks' zeros is exact) and the C
    of them are summed in the router's order; otherwise they are summed before, which moves C times less.
    hopper: by `hopper_ffn` in place of `ffn`, gate_up and down, and the scales of 8-bit ones, being in its layout.
    """
    slots = gate_up.shape[1]
    everyone, all_weights, all_ids = dispatch.gather(x, weights, ids)
    first = (lax.axis_index(AXIS) if dispatch.ranks > 1 else 0) * slots
    slot = choose_slots(all_ids, table, spread) - first
    slot = jnp.where((slot >= 0) & (slot < slots), slot, -1)
    if hopper:
        from moe_jax.kernels.hopper_ffn import hopper_ffn  # Pallas takes its time to import

        run = partial(hopper_ffn, everyone, slot, all_weights, gate_up, down, layer, 1 / dispatch.ranks, scales)
        return run(residual=residual) if dispatch.ranks == 1 else residual + dispatch.reduce(run())
    y = ffn(everyone, slot, gate_up, down, layer, tile)
    if deterministic:
        return residual + weighted_sum(dispatch.reduce(y), weights)
    return residual + dispatch.reduce(weighted_sum(y, all_weights).astype(x.dtype))


def weighted_sum(y: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over choices of weights[m, c] * y[m, c], first to last, [M, H]."""
    out = y[:, 0] * weights[:, 0, None]
    for c in range(1, weights.shape[1]):
        out = out + y[:, c] * weights[:, c, None]
    return out.astype(y.dtype)
