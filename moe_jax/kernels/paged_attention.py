"""Attention over the pages of the KV cache for Hopper, for decode rows and prefill tiles, grouped-query and latent.

A warpgroup takes up to 64 query rows (the heads of a group, of one token or of several) and visits pages of 64
positions, which copies bring in a few ahead. Long contexts are split over warpgroups. Latent values are as wide as the
accumulators of two: each scores every other page, hands its weights to the other through the page's last rows, and
takes half of the values of all pages, so that one multiplies while the other is at its softmax.
What it returns is normalised, with the logarithm of what was summed, so that parts can be put together (`merge`).
Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867); split contexts: Flash-Decoding (Dao et al. 2023).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from moe_jax.kernels.grouped_gemm import SMS

plgpu: Any = mosaic_gpu  # of jax 0.11; 0.10, which type checks may see, has other signatures
PAGE = 64  # positions in a page: wgmma's narrow side for scores, its depth for values
ROWS = 64  # query rows of a warpgroup
LOG2E = math.log2(math.e)
UNSEEN = -1e30  # a finite start, so that a row that sees nothing stays finite
SHARED_MEMORY = 224 * 1024  # bytes for queries and pages; sums, barriers and alignment take the rest of 227 KiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Queries:
    """What each item, consecutive tokens of a sequence, may see. All [items] int32."""

    entry: jax.Array  # row of the block tables
    seen: jax.Array  # positions before it are in the cache and seen by all of the item; 0 for an item of no use
    first: jax.Array  # the sequence's first row in this step
    row: jax.Array  # the item's first row in this step; token t also sees rows first to row + t - 1


class _Span(NamedTuple):
    """What a warpgroup visits."""

    head: jax.Array
    part: jax.Array
    begin: jax.Array  # first page of the part
    old: jax.Array  # pages of the cache
    total: jax.Array  # and of this step
    real: jax.Array  # false for the last block's second warpgroup where units are odd


Mode = Literal["parts", "rows", "values"]


def _modes(rows: int, value_dim: int) -> tuple[Mode, int]:
    """What the warpgroups of a block share out, and how many there are."""
    if value_dim > 256:
        return "values", 2  # accumulators of 512 columns do not fit one warpgroup
    if rows <= ROWS:
        return "parts", 2  # each has its own: a head's part, or its whole context
    return "rows", 2 if rows % (2 * ROWS) == 0 else 1


def choose_splits(items: int, kv_heads: int, rows: int, value_dim: int, most: int) -> int:
    """Parts of contexts of up to `most` pages that are likely the fastest, for queries [items, kv_heads, rows, ...]."""
    mode, wgs = _modes(rows, value_dim)

    def pages(splits: int) -> float:
        """How long it takes, as so many pages: rounds on all multiprocessors, beginning a round, and merging."""
        blocks = -(-kv_heads * splits // 2) if mode == "parts" else kv_heads * -(-rows // ROWS) * splits
        return -(-items * blocks // SMS) * (-(-most // splits) + 3) + 0.05 * splits

    return min(range(1, max(1, min(32 if mode == "parts" else 16, most)) + 1), key=pages)


def paged_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    new_keys: jax.Array | None,
    new_values: jax.Array | None,
    layer: jax.Array,
    tables: jax.Array,
    items: Queries,
    value_dim: int,
    tokens: int,
    splits: int = 1,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Each item's queries over what it may see, in parts.

    q [items, kv_heads, rows, key_dim] bfloat16, scaled; rows are `tokens` times the query heads of a kv head, token by
    token, and then padding up to a multiple of 8, from 64 on of 64. keys [L, pages, kv_heads, key_dim, 64] and values
    [L, pages, kv_heads, 64, value_dim], or None where values are the first value_dim numbers of the keys; new_keys and
    new_values [pages, kv_heads, ...] hold the rows of this step in order, 64 a page, or None where no item sees any.
    layer [] int32; tables [entries, pages] int32. Key and value dims must be multiples of 64. Nothing may be NaN.

    Returns, for S = splits parts, [items, S, kv_heads, rows, value_dim] in q's dtype, and the base-2 logarithm of the
    sum of exponentials [items, S, kv_heads, rows or more] float32, -inf where nothing is seen (and then zeros).
    """
    n, kv_heads, rows, key_dim = q.shape
    dtype = q.dtype
    if key_dim % 64 or value_dim % 64 or keys.shape[-1] != PAGE:
        raise ValueError(
            f"key dim {key_dim}, value dim {value_dim}, page {keys.shape[-1]}: expected multiples of 64, 64"
        )
    if rows % 8 or (rows > ROWS and rows % ROWS):
        raise ValueError(f"{rows} query rows: expected a multiple of 8, from 64 on of 64")
    mode, wgs = _modes(rows, value_dim)
    apart = mode == "parts"
    per_block = wgs if mode == "rows" else 1
    blocks = -(-rows // (ROWS * per_block))
    height = min(rows, ROWS)
    room = 1 if mode == "values" else wgs  # for queries, and then for results
    width = value_dim // wgs if mode == "values" else value_dim
    latent = values is None
    page_bytes = PAGE * 2 * (key_dim + (0 if latent else value_dim))
    taken = room * ROWS * 2 * max(key_dim, value_dim)
    stages = min(wgs if mode == "values" else 8, (SHARED_MEMORY - taken) // page_bytes)
    if apart:
        stages -= stages % wgs  # each warpgroup has its own slots
    if mode == "values" and not (latent and key_dim > value_dim and value_dim % (64 * wgs) == 0):
        raise ValueError(f"value dim {value_dim}: expected at most 256, or a multiple of 128 in longer keys")
    if stages < 2:
        raise ValueError(f"key dim {key_dim} and value dim {value_dim}: two pages do not fit in shared memory")
    streams = wgs if apart else 1  # of pages
    depth = stages // streams
    # A page is copied in pieces, each with barriers of its own where warpgroups free them apart: either's values, and
    # what is no value.
    cuts = [0, width, value_dim, key_dim] if mode == "values" else [*range(0, key_dim, 256), key_dim]
    pieces = [(a, b - a) for a, b in itertools.pairwise(cuts)]  # first row, rows
    barriers = len(pieces) if mode == "values" else 1  # of a page
    pages = keys.shape[1]
    together = 2 if mode == "values" and blocks % 2 == 0 else 1  # blocks of threads that share copies of pages
    shared_by = "pair" if together > 1 else None
    group = (rows // tokens) if new_keys is not None else 1

    def body(
        *refs: Any, q_s: Any, k_s: Any, v_s: Any, l_s: Any, q_full: Any, full: Any, empty: Any, ready: Any, done: Any
    ) -> None:
        given = list(refs)
        q_g, k_g = given.pop(0), given.pop(0)
        v_g = None if latent else given.pop(0)
        nk_g = None if new_keys is None else given.pop(0)
        nv_g = None if latent or new_keys is None else given.pop(0)
        table_g, entry_g, seen_g, first_g, row_g, layer_g, o_g, l_g = given
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        seen, first, row = seen_g[item], first_g[item], row_g[item]
        held = lax.div(seen + PAGE - 1, PAGE)
        per = lax.div(held + splits - 1, splits)
        first_new = lax.div(first, PAGE)
        block = lax.rem(lax.div(lax.axis_index("unit"), splits), blocks // together)
        if shared_by:
            block = block * together + lax.axis_index(shared_by)

        def span(w: Any) -> _Span:
            unit = lax.axis_index("unit") * streams + (w if apart else 0)
            part, head = lax.rem(unit, splits), lax.div(unit, splits * (blocks // together))
            begin = part * per
            old = jnp.clip(held - begin, 0, per)
            total = old
            if nk_g is not None:
                fresh = jnp.maximum(lax.div(row + tokens - 1 + PAGE - 1, PAGE) - first_new, 0)
                total = old + jnp.where(part == splits - 1, fresh, 0)
            real = head < kv_heads
            return _Span(jnp.minimum(head, kv_heads - 1), part, begin, old, jnp.where(real, total, 0), real)

        def bring(source_k: Any, source_v: Any, base: jax.Array, slot: jax.Array, again: jax.Array) -> None:
            for c, (at, rows_) in enumerate(pieces):
                barrier = slot * barriers + c % barriers
                if c < barriers:
                    pl.when(again)(lambda at=barrier: plgpu.barrier_wait(empty.at[at]))
                from_, to = source_k.at[pl.ds(base * key_dim + at, rows_)], k_s.at[slot, pl.ds(at, rows_)]
                plgpu.copy_gmem_to_smem(from_, to, full.at[barrier], collective_axes=shared_by)
            if source_v is not None:
                plgpu.copy_gmem_to_smem(source_v.at[pl.ds(base * PAGE, PAGE)], v_s.at[slot], full.at[slot * barriers])

        @pl.when(wg == wgs)
        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")
            entry, layer = entry_g[item], layer_g[0]
            spans = [span(w) for w in range(streams)]
            for w in range(room):
                rows_at = pl.ds((block * per_block + (w if mode == "rows" else 0)) * height, height)
                for j in range(key_dim // 64):
                    from_ = q_g.at[item, spans[w % streams].head, rows_at, pl.ds(j * 64, 64)]
                    plgpu.copy_gmem_to_smem(from_, q_s.at[w, j, pl.ds(0, height)], q_full)

            def pages_of(i: Any) -> tuple[jax.Array, ...]:
                return tuple(table_g[entry, jnp.minimum(s.begin + i, tables.shape[1] - 1)] for s in spans)

            def per_page(i: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                ahead = pages_of(i + 1)
                for w, (mine, page) in enumerate(zip(spans, now, strict=True)):
                    slot = w * depth + lax.rem(i, depth)

                    @pl.when(i < jnp.minimum(mine.old, mine.total))
                    def _(mine: _Span = mine, page: jax.Array = page, slot: jax.Array = slot) -> None:
                        bring(k_g, v_g, (layer * pages + page) * kv_heads + mine.head, slot, i >= depth)

                    if nk_g is not None:

                        @pl.when((i >= mine.old) & (i < mine.total))
                        def _(mine: _Span = mine, slot: jax.Array = slot) -> None:
                            bring(nk_g, nv_g, (first_new + i - mine.old) * kv_heads + mine.head, slot, i >= depth)

                return ahead

            lax.fori_loop(0, reduce(jnp.maximum, [s.total for s in spans]), per_page, pages_of(0))

            def drain(j: jax.Array, _: None) -> None:
                for w, mine in enumerate(spans):

                    @pl.when(mine.total > j)
                    def _(w: int = w, total: jax.Array = mine.total) -> None:
                        for c in range(barriers):
                            plgpu.barrier_wait(empty.at[(w * depth + lax.rem(total - 1 - j, depth)) * barriers + c])

            lax.fori_loop(0, depth, drain, None)

        def consume(turn: Any) -> None:
            """`turn` is the warpgroup's number, static where warpgroups do not all do the same."""
            by_row, square = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
            head, part, begin, old, total, real = span(wg)
            rows_of = block * per_block + (wg if mode == "rows" else 0)
            column_of = turn * width if mode == "values" else 0  # of values
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 1, layout=square)
            token: Any = None
            if nk_g is not None:
                line = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 0, layout=square)
                token = lax.div(line + rows_of * ROWS, jnp.int32(group))
            plgpu.barrier_wait(q_full)

            def multiply_scores(s: Any, slot: jax.Array) -> None:
                queries = slot - turn if mode == "values" else wg
                for c, (at, rows_) in enumerate(pieces):
                    if c < barriers:
                        plgpu.barrier_wait(full.at[slot * barriers + c])
                    for j in range(at // 64, (at + rows_) // 64):
                        plgpu.wgmma(s, q_s.at[queries, j], k_s.at[slot, pl.ds(j * 64, 64)])

            def masked(s: jax.Array, i: jax.Array) -> jax.Array:
                """Scores of page i [ROWS, PAGE], -inf where nothing is seen."""
                if nk_g is None:
                    visible = column + (begin + i) * PAGE < seen
                else:
                    fresh = i >= old
                    x = column + jnp.where(fresh, first_new + i - old, begin + i) * PAGE
                    end = jnp.where(fresh, row, seen) + token * fresh.astype(jnp.int32)
                    visible = (x >= jnp.where(fresh, first, 0)) & (x < end)
                return jnp.where(visible, s, -jnp.inf)

            def scores(i: jax.Array, slot: jax.Array) -> jax.Array:
                def multiply(s: Any) -> jax.Array:
                    multiply_scores(s, slot)
                    return s[...]

                return masked(pl.run_scoped(multiply, plgpu.ACC((ROWS, PAGE), jnp.float32)), i)

            def softmax(s: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                """Weights relative to a maximum [ROWS] that is at least m, the maximum, and their sums."""
                top = jnp.maximum(m, s.max(axis=1) * LOG2E)
                p = jnp.exp2(s * LOG2E - lax.broadcast_in_dim(top, s.shape, [0]))
                return p.astype(dtype), top, p.sum(axis=1)

            def weigh(
                acc: jax.Array, scale: jax.Array, p: jax.Array, slot: jax.Array, meanwhile: Any = None
            ) -> tuple[Any, ...]:
                """acc [ROWS, width] times scale [ROWS], with the values of a page; and what `meanwhile` returns, which
                has the types of p, scale, scale."""
                acc = acc * lax.broadcast_in_dim(scale, acc.shape, [0])
                v = k_s.at[slot, pl.ds(column_of, width)].T if latent else v_s.at[slot]
                found: Any = ()

                def multiply(refs: Any) -> None:
                    plgpu.wgmma(refs[0], p, v)
                    for ref, x in zip(refs[1:], meanwhile() if meanwhile else (), strict=True):
                        ref[...] = x
                    plgpu.wgmma_wait(0)

                if interpret is not None:  # the interpreter (jax 0.11.2) multiplies only what is in shared memory
                    acc += jnp.dot(p, v[...], preferred_element_type=jnp.float32)
                    found = meanwhile() if meanwhile else ()
                    plgpu.commit_smem()  # for its race detector, to which this is a read that a copy cannot wait for
                elif width <= 128:
                    acc += pl.run_scoped(lambda r: (multiply((r,)), r[...])[1], plgpu.ACC((ROWS, width), jnp.float32))
                else:
                    like = (p, scale, scale) if meanwhile else ()
                    acc, *found = pl.run_state(multiply)((plgpu.ACC.init(acc), *like))
                plgpu.barrier_arrive(empty.at[slot * barriers + (turn if mode == "values" else 0)])
                return acc, *found

            def publish(p: jax.Array, top: jax.Array, slot: jax.Array) -> None:
                """To the other warpgroup, in the page's last rows: scores are all that they were for."""
                plgpu.commit_smem()
                k_s.at[slot, pl.ds(value_dim, ROWS)][...] = p
                l_s[turn] = top
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[turn])

            def published(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
                plgpu.barrier_wait(ready.at[slot])
                top = plgpu.load(l_s.at[slot], layout=by_row)
                p = plgpu.load(k_s.at[slot, pl.ds(value_dim, ROWS)], layout=square)
                plgpu.barrier_arrive(empty.at[slot * barriers + 2])
                return p, top

            def own(i: jax.Array, state: Sequence[jax.Array], slot: jax.Array) -> tuple[jax.Array, ...]:
                acc, m, total_p = state
                p, top, sums = softmax(scores(i, slot), m)
                if mode == "values":
                    publish(p, top, slot)
                scale = jnp.exp2(m - top)
                return *weigh(acc, scale, p, slot), top, total_p * scale + sums

            def other(state: Sequence[jax.Array], slot: jax.Array) -> tuple[jax.Array, ...]:
                acc, m, total_p = state
                p, top = published(slot)
                scale = jnp.exp2(m - top)
                return *weigh(acc, scale, p, slot), top, total_p * scale

            def other_and_own(
                i: jax.Array, state: Sequence[jax.Array], before: jax.Array, slot: jax.Array
            ) -> tuple[jax.Array, ...]:
                """`other` of page i - 1 and `own` of page i, whose scores and softmax run beside the former."""
                acc, m, total_p = state

                def both(s: Any) -> tuple[jax.Array, ...]:
                    multiply_scores(s, slot)
                    p, top = published(before)

                    def meanwhile() -> tuple[jax.Array, ...]:
                        found = softmax(masked(plgpu.wgmma_accumulator_load(s, wait_n=1), i), top)
                        publish(*found[:2], slot)
                        return found

                    scale = jnp.exp2(m - top)
                    after, mine, high, sums = weigh(acc, scale, p, before, meanwhile)
                    last = jnp.exp2(top - high)
                    return *weigh(after, last, mine, slot), high, total_p * scale * last + sums

                return pl.run_scoped(both, plgpu.ACC((ROWS, PAGE), jnp.float32))

            def per_page(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot = lax.rem(i, depth) + (wg * depth if apart else 0)
                return own(i, state, slot)

            # The first of the two slots stays 0. Were that known when compiled, addresses of all products would be kept
            # over the loop: more than there are registers, and what spills has no room in L1 beside shared memory.
            never = lax.shift_right_logical(seen, 30)

            def per_pair(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                """Scores of a page each, values of both, in the pages' order."""
                *now, slot = state
                if turn == 0:
                    return *other(own(2 * i, now, slot), slot + 1), slot + never
                return *other_and_own(2 * i + 1, now, slot, slot + 1), slot + never

            def last(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                """A page that is without a second."""
                *now, slot = state
                return *(own(total - 1, now, slot) if turn == 0 else other(now, slot)), slot + never

            state = (
                plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), square),
                plgpu.layout_cast(jnp.full((ROWS,), UNSEEN, jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
            )
            if mode == "values":
                pairs = lax.fori_loop(0, lax.div(total, 2), per_pair, (*state, jnp.int32(0)))
                acc, m, total_p, _ = lax.fori_loop(0, lax.rem(total, 2), last, pairs)
                l_s[2 + turn] = total_p
                plgpu.commit_smem()
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)  # from here on the queries' place may be written to
                total_p += plgpu.load(l_s.at[3 - turn], layout=by_row)
            else:
                acc, m, total_p = lax.fori_loop(0, total, per_page, state)
            acc = acc * lax.broadcast_in_dim(1 / jnp.maximum(total_p, 1e-30), acc.shape, [0])
            results = [(0 if mode == "values" else wg, column_of // 64 + j) for j in range(width // 64)]
            for j, at in enumerate(results):
                q_s.at[at][...] = acc[:, j * 64 : (j + 1) * 64].astype(dtype)
            l_s[wg] = m + jnp.log2(total_p)
            plgpu.commit_smem()

            @pl.when(real)
            def _() -> None:
                for at in results:
                    to = o_g.at[item, part, head, pl.ds(rows_of * height, height), pl.ds(at[1] * 64, 64)]
                    plgpu.copy_smem_to_gmem(q_s.at[*at, pl.ds(0, height)], to)

            @pl.when(real & ((wg == 0) | (mode != "values")))
            def _() -> None:
                plgpu.copy_smem_to_gmem(l_s.at[wg], l_g.at[item, part, head, pl.ds(rows_of * ROWS, ROWS)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg < wgs)
        def _() -> None:
            plgpu.set_max_registers(232, action="increase")
            if mode == "values":
                for turn in range(wgs):
                    pl.when(wg == turn)(partial(consume, turn))
            else:
                consume(wg)

    def shared(*shape: int) -> Any:
        tiling = plgpu.TilingTransform((8, PAGE)), plgpu.SwizzleTransform(2 * PAGE)
        return plgpu.SMEM(shape, dtype, transforms=tiling)

    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((n, splits, kv_heads, rows, value_dim), dtype),
            jax.ShapeDtypeStruct((n, splits, kv_heads, -(-rows // ROWS) * ROWS), jnp.float32),
        ),
        grid=(n, -(-kv_heads * blocks // together * splits // streams)),
        grid_names=("item", "unit"),
        cluster=(together,) if shared_by else (),
        cluster_names=(shared_by,) if shared_by else (),
        num_threads=wgs + 1,
        thread_name="wg",
        scratch_types=dict(
            q_s=shared(room, max(key_dim, value_dim) // 64, ROWS, 64),
            k_s=shared(stages, key_dim, PAGE),
            v_s=plgpu.SMEM((8,), jnp.float32) if latent else shared(stages, PAGE, value_dim),
            l_s=plgpu.SMEM((2 * wgs, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=room * key_dim // 64),
            full=plgpu.Barrier(num_arrivals=len(pieces) // barriers + (not latent), num_barriers=stages * barriers),
            empty=plgpu.ClusterBarrier(collective_axes=(shared_by,), num_arrivals=1, num_barriers=stages * barriers)
            if shared_by
            else plgpu.Barrier(num_arrivals=wgs if mode == "rows" else 1, num_barriers=stages * barriers),
            ready=plgpu.Barrier(num_arrivals=1, num_barriers=wgs),
            done=plgpu.Barrier(num_arrivals=wgs),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # rows are reduced in a warp
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    arguments = [q, keys.reshape(-1, PAGE)]
    if values is not None:
        arguments.append(values.reshape(-1, value_dim))
    if new_keys is not None:
        arguments.append(new_keys.reshape(-1, PAGE))
        if new_values is not None:
            arguments.append(new_values.reshape(-1, value_dim))
    out, lse = run(*arguments, tables, items.entry, items.seen, items.first, items.row, layer.reshape(1))
    return out, lse


def paged_attention_reference(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    new_keys: jax.Array | None,
    new_values: jax.Array | None,
    layer: jax.Array,
    tables: jax.Array,
    items: Queries,
    value_dim: int,
    tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """The same in one part, [items, kv_heads, rows, ...]: plain JAX in float32, every sequence's pages gathered."""
    rows = q.shape[2]
    f32 = jnp.float32
    k = jnp.moveaxis(keys[layer][tables[items.entry]], 1, 3).astype(f32)  # [items, kv_heads, key_dim, pages, 64]
    k = k.reshape(*k.shape[:3], -1)
    position = jnp.arange(k.shape[-1])
    token = jnp.arange(rows) // max(1, rows // tokens)
    mask = jnp.broadcast_to((position < items.seen[:, None])[:, None], (q.shape[0], rows, k.shape[-1]))
    if values is None:
        v = k[:, :, :value_dim].swapaxes(2, 3)
    else:
        v = values[layer][tables[items.entry]].astype(f32).swapaxes(1, 2)
        v = v.reshape(*v.shape[:2], -1, value_dim)
    if new_keys is not None:
        nk = jnp.moveaxis(new_keys, 0, 2).astype(f32)  # [kv_heads, key_dim, pages, 64]
        nk = nk.reshape(*nk.shape[:2], -1)
        nv = nk[:, :value_dim].swapaxes(1, 2) if new_values is None else new_values.astype(f32).swapaxes(0, 1)
        nv = nv.reshape(nv.shape[0], -1, value_dim)
        x = jnp.arange(nk.shape[-1])
        fresh = (x >= items.first[:, None, None]) & (x < (items.row[:, None] + token)[..., None])
        k = jnp.concatenate([k, jnp.broadcast_to(nk, (k.shape[0], *nk.shape))], axis=-1)
        v = jnp.concatenate([v, jnp.broadcast_to(nv, (v.shape[0], *nv.shape))], axis=2)
        mask = jnp.concatenate([mask, fresh], axis=-1)
    mask = mask[:, None]
    s = jnp.where(mask, jnp.einsum("nhrd,nhdj->nhrj", q.astype(f32), k, precision="highest"), -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    p = jnp.where(mask, jnp.exp(s - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0)
    return jnp.einsum("nhrj,nhjv->nhrv", p, v, precision="highest"), lse * LOG2E


def merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parts along axis 1 as one: out [n, S, ..., rows, dim], lse [n, S, ..., rows or more] in base 2; float32. Nothing
    seen: zeros."""
    if lse.shape[1] == 1:
        return out[:, 0].astype(jnp.float32), lse[:, 0, ..., : out.shape[-2]]
    # Part by part: XLA makes one pass of sums that are written out, and several of reductions.
    parts, lse = range(lse.shape[1]), lse[..., : out.shape[-2]]
    top = reduce(jnp.maximum, (lse[:, i] for i in parts))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = [jnp.exp2(lse[:, i] - top) for i in parts]
    total = reduce(jnp.add, weights)
    scale = 1 / jnp.maximum(total, 1e-30)
    y = reduce(jnp.add, ((w * scale)[..., None] * out[:, i].astype(jnp.float32) for i, w in enumerate(weights)))
    return y, jnp.log2(total) + top
