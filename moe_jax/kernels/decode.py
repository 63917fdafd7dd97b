"""The small operations of a decode step's layer on a GPU, each in one kernel (Pallas, Triton).

XLA makes some thirty kernels of what lies between a layer's products, each of a few microseconds, most of them the wait
for the one before. Each function is `model`'s or `routing`'s of the same purpose, for shapes that `fits` names; weights
are whole stacks with the layer's number, so that no layer's are cut out first.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.config import ModelConfig
from moe_jax.kernels.grouped_gemm import ALIGN, Tiles, tile_step

LOG2E = math.log2(math.e)
CHUNK = 32  # pairs that are counted at once
MOST_PAIRS = 2048


def _is_power(*sizes: int) -> bool:
    return all(n > 0 and n & (n - 1) == 0 for n in sizes)


def fits(c: ModelConfig) -> bool:
    """Whether the model's decode steps can use these kernels: Triton's blocks are powers of two."""
    return (
        c.latent is None
        and c.qk_norm == "head"
        and c.clip_qkv is None
        and not c.rope.interleaved
        and (c.scoring, c.routing_bias, c.num_groups) == ("softmax", False, 1)
        and _is_power(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.num_experts, c.top_k)
        and c.num_heads // c.num_kv_heads % 8 == 0
        and c.num_experts >= 16
    )


def call(body: Callable[..., None], out: Any, grid: tuple[int, ...], warps: int, interpret: bool) -> Any:
    run = pl.pallas_call(
        body, out_shape=out, grid=grid, compiler_params=plt.CompilerParams(num_warps=warps), interpret=interpret
    )

    def quietly(*arguments: jax.Array) -> Any:
        with warnings.catch_warnings():  # JAX means to drop this backend one day
            warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
            return run(*arguments)

    return quietly


def norm(x: jax.Array, weights: jax.Array, layer: jax.Array, eps: float, interpret: bool = False) -> jax.Array:
    """`model.rms_norm` of x [n, H] with weights [L, H]."""
    n, size = x.shape

    def body(x_ref: Any, w_ref: Any, layer_ref: Any, out_ref: Any) -> None:
        m = pl.program_id(0)
        f = x_ref[m, :].astype(jnp.float32)
        scale = lax.rsqrt((f * f).sum() / size + eps)
        out_ref[m, :] = (f * scale).astype(x.dtype) * w_ref[layer_ref[0], :]

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return call(body, out, (n,), 8, interpret)(x, weights, layer.reshape(1))


def split_heads(
    qkv: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    c: ModelConfig,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, normed, rotated and scaled, keys, normed and rotated, and values, with zeros for what is not finite.

    qkv [n, (heads + 2 kv_heads) * D]; norms [L, D]; turn: `model.rotary`.
    """
    n, half = qkv.shape[0], c.head_dim // 2
    heads, kv_heads = c.num_heads, c.num_kv_heads
    dtype, eps = qkv.dtype, c.rms_norm_eps

    def body(x_ref: Any, qn_ref: Any, kn_ref: Any, cos_ref: Any, sin_ref: Any, layer_ref: Any, *out: Any) -> None:
        q_ref, k_ref, v_ref = out
        m, layer = pl.program_id(0), layer_ref[0]
        cos, sin = cos_ref[m, :][None], sin_ref[m, :][None]

        def turned(first: int, count: int, w_ref: Any) -> tuple[jax.Array, jax.Array]:
            a, b = (x_ref[m, pl.ds(first, count), i, :].astype(jnp.float32) for i in range(2))
            scale = lax.rsqrt(((a * a).sum(1) + (b * b).sum(1)) / (2 * half) + eps)[:, None]
            a, b = (((h * scale).astype(dtype) * w_ref[layer, i, :][None]) for i, h in enumerate((a, b)))
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

        def finite(x: jax.Array) -> jax.Array:
            return jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, x, jnp.zeros_like(x))

        for i, h in enumerate(turned(0, heads, qn_ref)):
            q_ref[m, :, i, :] = h * jnp.asarray(c.attention_scale, dtype)
        for i, h in enumerate(turned(heads, kv_heads, kn_ref)):
            k_ref[m, :, i, :] = finite(h)
        for i in range(2):
            v_ref[m, :, i, :] = finite(x_ref[m, pl.ds(heads + kv_heads, kv_heads), i, :])

    shapes = [(n, count, 2, half) for count in (heads, kv_heads, kv_heads)]
    norms = (w.reshape(-1, 2, half) for w in (q_norm, k_norm))
    angles = (t.reshape(n, half) for t in turn)
    run = call(body, [jax.ShapeDtypeStruct(s, dtype) for s in shapes], (n,), 4, interpret)
    q, k, v = run(qkv.reshape(n, -1, 2, half), *norms, *angles, layer.reshape(1))
    return q.reshape(n, heads, -1), k.reshape(n, kv_heads, -1), v.reshape(n, kv_heads, -1)


def merge(
    out: jax.Array, lse: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
    """What `paged_attention` found in parts and what each row finds in itself, as one: [n, kv_heads, R, D].

    out [n, S, kv_heads, R, D]; lse [n, S, kv_heads, R or more]; q [n, kv_heads, R, D]; k, v [n, kv_heads, D].
    """
    n, parts, kv_heads, rows, _ = out.shape

    def body(o_ref: Any, l_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any) -> None:
        m, h = pl.program_id(0), pl.program_id(1)
        own = (q_ref[m, h, :, :].astype(jnp.float32) * k_ref[m, h, :].astype(jnp.float32)[None]).sum(1) * LOG2E
        found = [l_ref[m, i, h, pl.ds(0, rows)] for i in range(parts)]
        top = own
        for part in found:
            top = jnp.maximum(top, part)
        weight = jnp.exp2(own - top)
        total, y = weight, weight[:, None] * v_ref[m, h, :].astype(jnp.float32)[None]
        for i, part in enumerate(found):
            weight = jnp.exp2(part - top)
            total += weight
            y += weight[:, None] * o_ref[m, i, h, :, :].astype(jnp.float32)
        y_ref[m, h, :, :] = (y / total[:, None]).astype(q.dtype)

    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return call(body, result, (n, kv_heads), 4, interpret)(out, lse, q, k, v)


def route(
    parts: jax.Array, table: jax.Array, layer: jax.Array, real: jax.Array, c: ModelConfig, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`moe.route` and `moe.choose_slots` without spreading: slots, weights and experts, all [n, C]; slots and experts
    are -1 where `real` [n] int32 is 0.

    parts [n, 3 E]: products with `moe.router_parts`; table [L, E, R].
    """
    n, experts, choices = parts.shape[0], c.num_experts, c.top_k

    def body(x_ref: Any, table_ref: Any, layer_ref: Any, real_ref: Any, *out: Any) -> None:
        slot_ref, weight_ref, id_ref = out
        m = pl.program_id(0)
        high, middle, low = (x_ref[m, i, :] for i in range(3))
        logits = low + middle + high
        scores = jnp.exp(logits - logits.max())
        scores = scores / scores.sum()
        expert = lax.broadcasted_iota(jnp.int32, (experts,), 0)
        place = lax.broadcasted_iota(jnp.int32, (choices,), 0)
        ids, weights = jnp.zeros(choices, jnp.int32), jnp.zeros(choices, jnp.float32)
        left = scores
        for i in range(choices):
            best = left.max()
            chosen = jnp.where(left == best, expert, experts).min()
            ids, weights = jnp.where(place == i, chosen, ids), jnp.where(place == i, best, weights)
            left = jnp.where(expert == chosen, -1.0, left)
        if c.normalize_weights:
            weights = weights / (weights.sum() + 1e-20)
        slots = table_ref[layer_ref[0], jnp.minimum(ids, experts - 1), jnp.zeros_like(ids)]
        slot_ref[m, :] = jnp.where(real_ref[m] != 0, slots, -1)
        id_ref[m, :] = jnp.where(real_ref[m] != 0, ids, -1)
        weight_ref[m, :] = weights * c.routed_scale

    shapes = [jax.ShapeDtypeStruct((n, choices), t) for t in (jnp.int32, jnp.float32, jnp.int32)]
    arguments = parts.reshape(n, 3, experts), table, layer.reshape(1), real
    return call(body, shapes, (n,), 1, interpret)(*arguments)


def can_assign(pairs: int, groups: int) -> bool:
    """Whether `assign` takes so many."""
    return CHUNK <= pairs <= MOST_PAIRS and 16 <= groups <= 512 and _is_power(pairs, groups)


def assign(slot: jax.Array, groups: int, block_m: int, interpret: bool = False) -> tuple[jax.Array, Tiles]:
    """`routing.assign_rows`'s places and `routing.cut_tiles`'s tiles. Each group counts all pairs for itself."""
    pairs = slot.size
    tiles = -(-(pairs + (block_m - 1) * min(groups, pairs)) // block_m)
    most, step = 1 << (-(-pairs // block_m) - 1).bit_length(), tile_step(block_m)

    def body(slot_ref: Any, place_ref: Any, group_ref: Any, row_ref: Any, size_ref: Any, count_ref: Any) -> None:
        me = pl.program_id(0)
        group = lax.broadcasted_iota(jnp.int32, (groups,), 0)

        def count(i: jax.Array, sizes: jax.Array) -> jax.Array:
            some = slot_ref[pl.ds(i * CHUNK, CHUNK)]
            return sizes + (some[:, None] == group[None]).astype(jnp.int32).sum(0)

        sizes = lax.fori_loop(0, pairs // CHUNK, count, jnp.zeros(groups, jnp.int32))
        cut = (sizes + block_m - 1) // block_m
        each = (sizes + step * cut - 1) // jnp.maximum(step * cut, 1) * step
        before = group < me
        first = jnp.where(before, (sizes + ALIGN - 1) // ALIGN * ALIGN, 0).sum()
        size, height = (jnp.where(group == me, v, 0).sum() for v in (sizes, each))
        begin = jnp.where((each > height) | (before & (each == height)), cut, 0).sum()
        pair = lax.broadcasted_iota(jnp.int32, (pairs,), 0)
        slots = slot_ref[:]
        mine = slots == me
        rank = jnp.cumsum(mine.astype(jnp.int32)) - 1
        plt.store(place_ref.at[pair], jnp.where(mine, first + rank, -1), mask=mine | ((slots < 0) & (me == 0)))
        done = lax.broadcasted_iota(jnp.int32, (most,), 0) * height
        at = jnp.minimum(begin + lax.broadcasted_iota(jnp.int32, (most,), 0), tiles - 1)
        for ref, value in (
            (group_ref, jnp.zeros_like(done) + me),
            (row_ref, first + done),
            (size_ref, jnp.minimum(size - done, height)),
        ):
            plt.store(ref.at[at], value, mask=done < size)

        @pl.when(me == 0)
        def _() -> None:
            count_ref[0] = cut.sum()

    shapes = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (pairs, tiles, tiles, tiles, 1)]
    place, *cuts, count = call(body, shapes, (groups,), 4, interpret)(slot.reshape(-1))
    return place.reshape(slot.shape), Tiles(cuts[0], cuts[1], cuts[2], count[0])
