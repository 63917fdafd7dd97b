"""Paged attention of a step's rows over the KV cache and the step's own new rows.

The cache is only read: the step returns its new keys and values, and `write` puts them in place afterwards, in a
program without collectives, so that a step that fails because a host died leaves the cache whole.

Layouts, of one rank: keys [layers, pages, kv_heads, key_dim, page_size], values [layers, pages, kv_heads, page_size,
value_dim]. With latent attention there is one kv head, and the values are the first `kv_rank` numbers of the keys:
nothing else is stored.

Each query row visits its pages in order, with arithmetic that no other row takes part in (products and sums over the
head, no matrix product), so a row's result is the same bits in a prefill, a chunk or a decode step: a page that is
masked out adds exact zeros. Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config import EngineConfig, ModelConfig

Cache = dict[str, jax.Array]
DECODE_ROWS = 16  # decode rows that visit their pages together: few, large operations
MASKED = -1e30  # finite, so that a row with nothing to see stays finite


class Entries(NamedTuple):
    """The sequences of a step. A decode entry i is row i; a prefill entry has whole row tiles of its own."""

    tables: jax.Array  # [entries, pages_per_sequence] int32: page of each page_size positions
    start: jax.Array  # [entries] int32: positions before it are in the cache, the others in this step
    first_row: jax.Array  # [entries] int32: row of position `start`
    tile_entry: jax.Array  # [T / row_tile] int32: entry of each prefill tile
    num_decode: jax.Array  # [] int32
    num_tiles: jax.Array  # [] int32, decode tiles included


def cache_shapes(model: ModelConfig, engine: EngineConfig) -> dict[str, tuple[int, ...]]:
    """Of one rank."""
    pages = (model.num_layers, engine.num_pages)
    if model.latent:
        return {"k": (*pages, 1, model.latent.kv_rank + model.latent.rope_dim, engine.page_size)}
    return {
        "k": (*pages, model.num_kv_heads, model.head_dim, engine.page_size),
        "v": (*pages, model.num_kv_heads, engine.page_size, model.head_dim),
    }


class _State(NamedTuple):
    """Online softmax of n query groups: maximum, sum of exponentials, weighted values."""

    m: jax.Array  # [n, kv_heads, rows]
    l: jax.Array  # noqa: E741  [n, kv_heads, rows]
    acc: jax.Array  # [n, kv_heads, rows, value_dim]


def _visit(state: _State, q: jax.Array, k: jax.Array, v: jax.Array, j: jax.Array, position: jax.Array) -> _State:
    """One page of each of n sequences. q [n, kv_heads, rows, key_dim] scaled; k [n, kv_heads, key_dim, P]; v [n, kv_heads,
    P, value_dim]; j [P] the page's positions; position [n, rows] of the queries."""
    v = jnp.where((j <= position.max(-1, keepdims=True))[:, None, :, None], v, 0)  # a stale page may hold anything, NaN too
    s = (q[..., None] * k[:, :, None]).sum(-2, dtype=jnp.float32)
    s = jnp.where((j <= position[..., None])[:, None], s, MASKED)
    m = jnp.maximum(state.m, s.max(-1))
    p = jnp.exp(s - m[..., None])
    keep = jnp.exp(state.m - m)
    pv = (p[..., None] * v[:, :, None]).sum(-2, dtype=jnp.float32)
    return _State(m, state.l * keep + p.sum(-1), state.acc * keep[..., None] + pv)


def attend(
    q: jax.Array, new: Cache, cache: Cache, layer: jax.Array, position: jax.Array, e: Entries, value_dim: int, tile: int, prefill: bool
) -> jax.Array:
    """q [T, heads, key_dim] scaled, new k [T, kv_heads, key_dim], v [T, kv_heads, value_dim] or absent, position [T].

    Returns [T, heads, value_dim] in q's dtype. Rows of no entry come out as zeros or garbage, never NaN.
    """
    rows, heads, key_dim = q.shape
    page_size, kv_heads = cache["k"].shape[-1], cache["k"].shape[2]
    groups = heads // kv_heads
    within = jnp.arange(page_size)

    def pages(name: str, i: jax.Array, tables: jax.Array) -> jax.Array:
        """Page i of each of n block tables [n, pages]."""
        return cache[name].at[layer, tables[:, i]].get(mode="promise_in_bounds")

    def values(k: jax.Array, i: jax.Array, tables: jax.Array) -> jax.Array:
        if "v" in cache:
            return pages("v", i, tables)
        return lax.optimization_barrier(k[:, :, :value_dim].swapaxes(2, 3))

    def start_state(n: int, r: int) -> _State:
        shape = (n, kv_heads, r)
        return _State(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, value_dim)))

    def finish(state: _State) -> jax.Array:
        return (state.acc / jnp.maximum(state.l, 1e-30)[..., None]).astype(q.dtype)

    def decode(i: jax.Array, out: jax.Array) -> jax.Array:
        """DECODE_ROWS rows, each of its own sequence, whose newest position is the row's own."""
        cut = lambda x: lax.dynamic_slice_in_dim(x, i * DECODE_ROWS, DECODE_ROWS)  # noqa: E731
        own = cut(position)
        tables, rows_q = cut(e.tables), cut(q).reshape(-1, kv_heads, groups, key_dim)
        own_k = cut(new["k"])[..., None]
        own_v = cut(new["v"])[:, :, None] if "v" in new else None

        def page(p: jax.Array, state: _State) -> _State:
            j = p * page_size + within
            mine = (j == own[:, None])[:, None]  # [n, 1, P]
            k = jnp.where(mine[:, :, None], own_k, pages("k", p, tables))
            v = values(k, p, tables)
            if own_v is not None:
                v = jnp.where(mine[..., None], own_v, v)
            return _visit(state, rows_q, k, v, j, own[:, None].repeat(groups, 1))

        state = lax.fori_loop(0, own.max() // page_size + 1, page, start_state(DECODE_ROWS, groups))
        return lax.dynamic_update_slice_in_dim(out, finish(state).reshape(-1, heads, value_dim), i * DECODE_ROWS, 0)

    out = lax.fori_loop(
        0, (e.num_decode + DECODE_ROWS - 1) // DECODE_ROWS, decode, jnp.zeros((rows, heads, value_dim), q.dtype)
    )
    if not prefill:
        return out

    def padded(x: jax.Array) -> jax.Array:  # so that a page's worth may be cut anywhere around an entry's rows
        return jnp.pad(x, ((page_size, page_size), (0, 0), (0, 0)))

    new_k = padded(new["k"]).transpose(1, 2, 0)[None]  # [1, kv_heads, key_dim, P + T + P]
    new_v = padded(new["v"]).swapaxes(0, 1)[None] if "v" in new else None

    def chunk(i: jax.Array, out: jax.Array) -> jax.Array:
        """A row tile, all of one sequence."""
        entry = e.tile_entry[i]
        start, tables = e.start[entry], e.tables[entry][None]
        tile_q = lax.dynamic_slice_in_dim(q, i * tile, tile).reshape(tile, kv_heads, groups, key_dim)
        tile_q = tile_q.transpose(1, 2, 0, 3).reshape(1, kv_heads, groups * tile, key_dim)
        own = jnp.tile(lax.dynamic_slice_in_dim(position, i * tile, tile), groups)[None]

        def old_page(p: jax.Array, state: _State) -> _State:
            k = pages("k", p, tables)
            return _visit(state, tile_q, k, values(k, p, tables), p * page_size + within, own)

        def mixed_page(p: jax.Array, state: _State) -> _State:
            j = p * page_size + within
            at = page_size + e.first_row[entry] + p * page_size - start
            k = jnp.where(j >= start, lax.dynamic_slice_in_dim(new_k, at, page_size, 3), pages("k", p, tables))
            v = values(k, p, tables)
            if new_v is not None:
                v = jnp.where((j >= start)[:, None], lax.dynamic_slice_in_dim(new_v, at, page_size, 2), v)
            return _visit(state, tile_q, k, v, j, own)

        state = lax.fori_loop(0, start // page_size, old_page, start_state(1, groups * tile))
        state = lax.fori_loop(start // page_size, own.max() // page_size + 1, mixed_page, state)
        o = finish(state).reshape(kv_heads, groups, tile, value_dim).transpose(2, 0, 1, 3)
        return lax.dynamic_update_slice_in_dim(out, o.reshape(tile, heads, value_dim), i * tile, 0)

    return lax.fori_loop((e.num_decode + tile - 1) // tile, e.num_tiles, chunk, out)


def write(cache: Cache, new: Cache, position: jax.Array, page: jax.Array) -> Cache:
    """The cache with a step's new rows in place. new k [layers, T, kv_heads, key_dim]; position, page [T], page -1
    for rows that are padding. Donate the cache; there is no collective in here."""
    offset = position % cache["k"].shape[-1]
    page = jnp.where(page < 0, cache["k"].shape[1], page)  # out of bounds: dropped
    written = {"k": cache["k"].at[:, page, :, :, offset].set(new["k"].swapaxes(0, 1), mode="drop")}
    if "v" in cache:
        written["v"] = cache["v"].at[:, page, :, offset].set(new["v"].swapaxes(0, 1), mode="drop")
    return written
