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
    """Online softmax: maximum, sum of exponentials, weighted values."""

    m: jax.Array  # [kv_heads, rows]
    l: jax.Array  # noqa: E741  [kv_heads, rows]
    acc: jax.Array  # [kv_heads, rows, value_dim]


def _visit(state: _State, q: jax.Array, k: jax.Array, v: jax.Array, j: jax.Array, position: jax.Array) -> _State:
    """One page. q [kv_heads, rows, key_dim] scaled; k [kv_heads, key_dim, P]; v [kv_heads, P, value_dim]; j [P] the
    page's positions; position [rows] of the queries."""
    seen = j <= position[:, None]
    v = jnp.where((j <= position.max())[:, None], v, 0)  # a stale page may hold anything, NaN too
    s = jnp.where(seen, (q[..., None] * k[:, None]).sum(-2, dtype=jnp.float32), MASKED)
    m = jnp.maximum(state.m, s.max(-1))
    p = jnp.exp(s - m[..., None])
    keep = jnp.exp(state.m - m)
    pv = (p[..., None] * v[:, None]).sum(-2, dtype=jnp.float32)
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

    def padded(x: jax.Array) -> jax.Array:  # so that a page's worth may be cut anywhere around an entry's rows
        return jnp.pad(x, ((page_size, page_size), (0, 0), (0, 0)))

    new_k = padded(new["k"]).transpose(1, 2, 0)  # [kv_heads, key_dim, P + T + P]
    new_v = padded(new["v"]).swapaxes(0, 1) if "v" in new else None

    def latent_values(k: jax.Array) -> jax.Array:
        return lax.optimization_barrier(k[:, :value_dim].swapaxes(1, 2))

    def run(q: jax.Array, position: jax.Array, entry: jax.Array) -> jax.Array:
        """q [n, heads, key_dim], position [n], all of one entry."""
        n = q.shape[0]
        q = q.reshape(n, kv_heads, groups, key_dim).transpose(1, 2, 0, 3).reshape(kv_heads, groups * n, key_dim)
        position = jnp.tile(position, groups)
        table, start = e.tables[entry], e.start[entry]
        within = jnp.arange(page_size)

        def cached(name: str, i: jax.Array) -> jax.Array:
            c = cache[name]
            return lax.dynamic_slice(c, (layer, table[i], 0, 0, 0), (1, 1, *c.shape[2:]))[0, 0]

        def old_page(i: jax.Array, state: _State) -> _State:
            k = cached("k", i)
            v = latent_values(k) if new_v is None else cached("v", i)
            return _visit(state, q, k, v, i * page_size + within, position)

        def mixed_page(i: jax.Array, state: _State) -> _State:
            j = i * page_size + within
            at = page_size + e.first_row[entry] + i * page_size - start
            fresh = j >= start
            k = jnp.where(fresh, lax.dynamic_slice_in_dim(new_k, at, page_size, 2), cached("k", i))
            if new_v is None:
                v = latent_values(k)
            else:
                v = jnp.where(fresh[:, None], lax.dynamic_slice_in_dim(new_v, at, page_size, 1), cached("v", i))
            return _visit(state, q, k, v, j, position)

        shape = (kv_heads, groups * n)
        state = _State(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, value_dim)))
        state = lax.fori_loop(0, start // page_size, old_page, state)
        state = lax.fori_loop(start // page_size, position.max() // page_size + 1, mixed_page, state)
        out = (state.acc / jnp.maximum(state.l, 1e-30)[..., None]).astype(q.dtype)
        return out.reshape(kv_heads, groups, n, value_dim).transpose(2, 0, 1, 3).reshape(n, heads, value_dim)

    def some_rows(size: int, entry_of: jax.Array | None, i: jax.Array, out: jax.Array) -> jax.Array:
        cut = [lax.dynamic_slice_in_dim(x, i * size, size) for x in (q, position)]
        return lax.dynamic_update_slice_in_dim(out, run(*cut, i if entry_of is None else entry_of[i]), i * size, 0)

    out = jnp.zeros((rows, heads, value_dim), q.dtype)
    out = lax.fori_loop(0, e.num_decode, lambda i, out: some_rows(1, None, i, out), out)
    if prefill:
        first = (e.num_decode + tile - 1) // tile
        out = lax.fori_loop(first, e.num_tiles, lambda i, out: some_rows(tile, e.tile_entry, i, out), out)
    return out


def write(cache: Cache, new: Cache, position: jax.Array, page: jax.Array) -> Cache:
    """The cache with a step's new rows in place. new k [layers, T, kv_heads, key_dim]; position, page [T], page -1
    for rows that are padding. Donate the cache; there is no collective in here."""
    offset = position % cache["k"].shape[-1]
    page = jnp.where(page < 0, cache["k"].shape[1], page)  # out of bounds: dropped
    written = {"k": cache["k"].at[:, page, :, :, offset].set(new["k"].swapaxes(0, 1), mode="drop")}
    if "v" in cache:
        written["v"] = cache["v"].at[:, page, :, offset].set(new["v"].swapaxes(0, 1), mode="drop")
    return written
