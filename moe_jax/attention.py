"""Paged attention of a step's rows over the KV cache and the step's own new rows.

The cache is only read: the step returns its new keys and values, and `write` puts them in place afterwards, in a
program without collectives, so that a step that fails because a host died leaves the cache whole.

Layouts, of one rank: keys [layers, pages, kv_heads, key_dim, page_size], values [layers, pages, kv_heads, page_size,
value_dim]. With latent attention there is one kv head, and the values are the first `kv_rank` numbers of the keys:
nothing else is stored.

Each query row visits the pages before it in order, and itself last, with arithmetic that no other row takes part in
(products and sums over the head, no matrix product), so a row's result is the same bits in a prefill, a chunk or a
decode step: what is masked out adds exact zeros. Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.config import EngineConfig, ModelConfig
from moe_jax.reduce import ordered_max, ordered_sum
from moe_jax.tiles import map_tiles

Cache = dict[str, jax.Array]
DECODE_ROWS = 8  # decode rows that visit their pages together: fewer operations against pages visited in vain
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


def new_shapes(model: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Of a step's new K/V rows of one rank."""
    if model.latent:
        return {"k": (model.num_layers, rows, 1, model.latent.kv_rank + model.latent.rope_dim)}
    return dict.fromkeys(("k", "v"), (model.num_layers, rows, model.num_kv_heads, model.head_dim))


class _State(NamedTuple):
    """Online softmax of the rows of n sequences: maximum, sum of exponentials, weighted values."""

    m: jax.Array  # [n, kv_heads, rows]
    l: jax.Array  # noqa: E741  [n, kv_heads, rows]
    acc: jax.Array  # [n, kv_heads, rows, value_dim]


def _visit(state: _State, q: jax.Array, k: list[jax.Array], v: list[jax.Array], j: jax.Array, own: jax.Array) -> _State:
    """A page each: what rows at positions own [n, rows] see of positions j [P], those strictly before their own.

    q [n, kv_heads, rows, key_dim] scaled; n times k [kv_heads, key_dim, P] and v [kv_heads, P, value_dim]. Pages come
    one by one because a product and sum then reads them where they lie; all else is done for the n together.
    """
    seen = (j < own[..., None])[:, None]
    q = q.astype(jnp.float32)
    s = jnp.stack([ordered_sum(q[i, ..., None] * k[i][:, None].astype(jnp.float32), -2) for i in range(len(k))])
    s = jnp.where(seen, s, MASKED)
    m = jnp.maximum(state.m, ordered_max(s, -1))
    p = jnp.where(seen, jnp.exp(s - m[..., None]), 0)
    keep = jnp.exp(state.m - m)
    # What is not seen may be anything, NaN too: a stale page, a neighbour's row.
    weighted = [
        jnp.where(p[i, ..., None] > 0, p[i, ..., None] * v[i][:, None].astype(jnp.float32), 0) for i in range(len(v))
    ]
    pv = jnp.stack([ordered_sum(w, -2) for w in weighted])
    return _State(m, state.l * keep + ordered_sum(p, -1), state.acc * keep[..., None] + pv)


def _finish(m: jax.Array, l: jax.Array, acc: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # noqa: E741
    """The last step of every row, which adds the row itself. All [T, kv_heads, groups, ...], k and v with groups 1."""
    s = ordered_sum(q.astype(jnp.float32) * k.astype(jnp.float32), -1)
    top = jnp.maximum(m, s)
    p, keep = jnp.exp(s - top), jnp.exp(m - top)
    return ((acc * keep[..., None] + p[..., None] * v) / (l * keep + p)[..., None]).astype(q.dtype)


def attend(
    q: jax.Array,
    new: Cache,
    cache: Cache,
    layer: jax.Array,
    position: jax.Array,
    e: Entries,
    value_dim: int,
    tile: int | None,
    row_tile: int,
    prefill: bool,
) -> jax.Array:
    """q [T, heads, key_dim] scaled, new k [T, kv_heads, key_dim], v [T, kv_heads, value_dim] or absent, position [T].

    Returns [T, heads, value_dim] in q's dtype. Rows of no entry come out finite. `tile` is that of `map_tiles`.
    """
    rows, heads, key_dim = q.shape
    page_size, kv_heads = cache["k"].shape[-1], cache["k"].shape[2]
    groups = heads // kv_heads
    within = jnp.arange(page_size)
    n = DECODE_ROWS
    grouped = q.reshape(rows, kv_heads, groups, key_dim)

    def cached(name: str, page: jax.Array) -> jax.Array:
        c = cache[name]
        return lax.dynamic_slice(c, (layer, page, 0, 0, 0), (1, 1, *c.shape[2:]))[0, 0]

    def values(k: jax.Array, page: jax.Array) -> jax.Array:
        if "v" in cache:
            return cached("v", page)
        return lax.optimization_barrier(k[:, :value_dim].swapaxes(1, 2))

    def start_state(n: int, r: int) -> _State:
        shape = (n, kv_heads, r)
        return _State(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, value_dim)))

    def seen_by_rows(i: jax.Array) -> _State:
        """What DECODE_ROWS decode rows, which are entries of the same numbers, see of their pages."""
        own, tables, rows_q = (lax.dynamic_slice_in_dim(x, i * n, n) for x in (position, e.tables, grouped))

        def page(p: jax.Array, state: _State) -> _State:
            k = [cached("k", tables[r, p]) for r in range(n)]
            v = [values(k[r], tables[r, p]) for r in range(n)]
            return _visit(state, rows_q, k, v, p * page_size + within, own[:, None])

        return lax.fori_loop(0, (own.max() + page_size - 1) // page_size, page, start_state(n, groups))

    def padded(x: jax.Array) -> jax.Array:  # so that a page's worth may be cut anywhere around an entry's rows
        return jnp.pad(x, ((page_size, page_size), (0, 0), (0, 0)))

    def seen_by_tile(i: jax.Array) -> _State:
        """What the rows of prefill tile i, all of one sequence, see of its pages, of which this step fills some."""
        entry = e.tile_entry[i]
        start, table = e.start[entry], e.tables[entry]
        tile_q = lax.dynamic_slice_in_dim(grouped, i * row_tile, row_tile)
        tile_q = tile_q.transpose(1, 2, 0, 3).reshape(1, kv_heads, groups * row_tile, key_dim)
        own = jnp.tile(lax.dynamic_slice_in_dim(position, i * row_tile, row_tile), groups)[None]

        def old_page(p: jax.Array, state: _State) -> _State:
            k = cached("k", table[p])
            return _visit(state, tile_q, [k], [values(k, table[p])], p * page_size + within, own)

        def mixed_page(p: jax.Array, state: _State) -> _State:
            j = p * page_size + within
            at = page_size + e.first_row[entry] + p * page_size - start
            k = jnp.where(j >= start, lax.dynamic_slice_in_dim(new_k, at, page_size, 2), cached("k", table[p]))
            v = values(k, table[p])
            if new_v is not None:
                v = jnp.where((j >= start)[:, None], lax.dynamic_slice_in_dim(new_v, at, page_size, 1), v)
            return _visit(state, tile_q, [k], [v], j, own)

        state = lax.fori_loop(0, start // page_size, old_page, start_state(1, groups * row_tile))
        return lax.fori_loop(start // page_size, (own.max() + page_size - 1) // page_size, mixed_page, state)

    def keep(seen: _State, state: _State, at: jax.Array) -> _State:
        """Put a state into that of all rows [T, kv_heads, groups, ...]."""
        return jax.tree.map(lambda all_rows, x: lax.dynamic_update_slice_in_dim(all_rows, x, at, 0), seen, state)

    def by_row(x: jax.Array) -> jax.Array:
        """A tile's [1, kv_heads, groups * row_tile, ...] as [row_tile, kv_heads, groups, ...]."""
        return jnp.moveaxis(x[0].reshape(kv_heads, groups, row_tile, *x.shape[3:]), 2, 0)

    shape = (rows, kv_heads, groups)
    seen = _State(jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, value_dim)))
    seen = lax.fori_loop(0, (e.num_decode + n - 1) // n, lambda i, seen: keep(seen, seen_by_rows(i), i * n), seen)
    if prefill:
        new_k = padded(new["k"]).transpose(1, 2, 0)  # [kv_heads, key_dim, P + T + P]
        new_v = padded(new["v"]).swapaxes(0, 1) if "v" in new else None
        first = (e.num_decode + row_tile - 1) // row_tile

        def one_tile(i: jax.Array, seen: _State) -> _State:
            return keep(seen, jax.tree.map(by_row, seen_by_tile(i)), i * row_tile)

        seen = lax.fori_loop(first, e.num_tiles, one_tile, seen)
    own_v = new["v"] if "v" in new else new["k"][..., :value_dim]
    out = map_tiles(_finish, tile, e.num_tiles, *seen, grouped, new["k"][:, :, None], own_v[:, :, None])
    return out.reshape(rows, heads, value_dim)


def attend_gathered(
    q: jax.Array,
    new: Cache,
    cache: Cache,
    layer: jax.Array,
    position: jax.Array,
    e: Entries,
    value_dim: int,
    row_tile: int,
    prefill: bool,
) -> jax.Array:
    """The same as `attend`, up to rounding, over all pages that a sequence could have at once, and without a loop."""
    rows, heads, key_dim = q.shape
    page_size, kv_heads = cache["k"].shape[-1], cache["k"].shape[2]
    j = jnp.arange(e.tables.shape[1] * page_size)

    def see(entry: jax.Array, q: jax.Array, own: jax.Array) -> jax.Array:
        """Entries [n] with r rows each: q [n, r, kv_heads, groups, key_dim], own [n, r] their positions."""
        table, start = e.tables[entry], e.start[entry, None]
        fresh = (j >= start)[:, None, :, None]
        row = jnp.clip(e.first_row[entry, None] + j - start, 0, rows - 1)
        k = cache["k"][layer, table].transpose(0, 2, 1, 4, 3).reshape(len(entry), kv_heads, len(j), key_dim)
        k = jnp.where(fresh, new["k"][row].swapaxes(1, 2), k)
        if "v" in cache:
            v = cache["v"][layer, table].swapaxes(1, 2).reshape(len(entry), kv_heads, len(j), value_dim)
            v = jnp.where(fresh, new["v"][row].swapaxes(1, 2), v)
        else:
            v = k[..., :value_dim]
        v = jnp.where((j <= own.max(1, keepdims=True))[:, None, :, None], v, 0)  # what is not seen may be anything
        s = jnp.einsum("nrkgd,nkld->nkgrl", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where((j <= own[..., None])[:, None, None], s, MASKED), axis=-1)
        return jnp.einsum("nkgrl,nkld->nrkgd", p.astype(v.dtype), v).astype(q.dtype)

    grouped = q.reshape(rows, kv_heads, heads // kv_heads, key_dim)
    n = min(rows, e.tables.shape[0])
    out = see(jnp.arange(n), grouped[:n, None], position[:n, None])[:, 0]
    if prefill:
        tiled = see(e.tile_entry, *(x.reshape(-1, row_tile, *x.shape[1:]) for x in (grouped, position)))
        out = jnp.pad(out, ((0, rows - n), (0, 0), (0, 0), (0, 0)))
        decode = jnp.arange(rows) < e.num_decode
        out = jnp.where(decode[:, None, None, None], out, tiled.reshape(out.shape))
    return out.reshape(rows, heads, value_dim)


def write(cache: Cache, new: Cache, position: jax.Array, page: jax.Array) -> Cache:
    """The cache with a step's new rows in place. new k [layers, T, kv_heads, key_dim]; position, page [T], page -1
    for rows that are padding. Donate the cache; there is no collective in here."""
    offset = position % cache["k"].shape[-1]
    page = jnp.where(page < 0, cache["k"].shape[1], page)  # out of bounds: dropped
    written = {"k": cache["k"].at[:, page, :, :, offset].set(new["k"].swapaxes(0, 1), mode="drop")}
    if "v" in cache:
        written["v"] = cache["v"].at[:, page, :, offset].set(new["v"].swapaxes(0, 1), mode="drop")
    return written
