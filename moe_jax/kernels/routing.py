"""From slots to tiles: where each (token, choice) pair's row lies among its group's, and the copying there and back.

`assign_rows` is plain JAX without a sort and without a loop: pairs are counted in chunks, so that it is a handful of
fused passes for 512 pairs and for 65,536. Pairs of no slot get no row, so what is not computed here costs nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from moe_jax.kernels.grouped_gemm import ALIGN, Tiles, tile_step

plgpu: Any = mosaic_gpu  # of jax 0.11; 0.10, which type checks may see, has other signatures
FEW, CHUNK = 2048, 256  # so many pairs are compared with one another: few all at once, more chunk by chunk
LANES = 128  # threads of a warpgroup


def padded_rows(pairs: int, groups: int) -> int:
    """Rows that `assign_rows` may use, for any routing."""
    return -(-(pairs + (ALIGN - 1) * min(groups, pairs)) // ALIGN) * ALIGN


def _over(x: jax.Array, n: int) -> jax.Array:
    """ceil(x / n). Where it can be a shift it is: XLA keeps divisions out of fusions, in kernels of their own."""
    return (x + n - 1) >> (n.bit_length() - 1) if n & (n - 1) == 0 else jax.lax.div(x + n - 1, jnp.int32(n))


def _before(counts: jax.Array) -> jax.Array:
    """[n] int32: the sum of those before each. Pair by pair, one pass for a few hundred; a scan takes several."""
    return jnp.where(jnp.tril(jnp.ones((counts.size, counts.size), bool), -1), counts, 0).sum(-1, dtype=jnp.int32)


def assign_rows(slot: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Sort pairs by slot, stably, each group beginning at a multiple of ALIGN.

    slot [M, C] int32 in -1..groups-1. Returns the row of each pair, [M, C] int32, -1 for no slot, below
    `padded_rows(M * C, groups)`; and the groups' sizes, [groups] int32.
    """
    pairs = slot.size
    chunk = pairs if pairs <= FEW else CHUNK
    chunks = -(-pairs // chunk)
    flat = jnp.pad(slot.reshape(-1), (0, chunks * chunk - pairs), constant_values=-1).reshape(chunks, chunk)
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    rank = ((flat[:, :, None] == flat[:, None, :]) & earlier).sum(-1, dtype=jnp.int32)
    counts = (flat[:, None] == jnp.arange(groups)[:, None]).sum(-1, dtype=jnp.int32)  # [chunks, groups]
    until = jnp.cumsum(counts, axis=0)
    sizes = until[-1]
    base = until - counts + _before(_over(sizes, ALIGN) * ALIGN)  # row of each chunk's first pair of each group
    row = rank + jnp.take_along_axis(base, jnp.maximum(flat, 0), axis=1)
    place = jnp.where(flat < 0, -1, row).reshape(-1)[:pairs].reshape(slot.shape)
    return place, sizes


def cut_tiles(sizes: jax.Array, pairs: int, block_m: int) -> Tiles:
    """Tiles of at most block_m rows of groups that lie as `assign_rows` has them; as many as any routing may need.

    A group's tiles are about equal: a narrow last one would take nearly as long, for its weights. Groups come by the
    height of their tiles, so that those which are multiplied at the same time end at the same time.
    """
    groups = sizes.size
    first, cut = _before(_over(sizes, ALIGN) * ALIGN), _over(sizes, block_m)
    step = tile_step(block_m)
    each = step * jax.lax.div(sizes + step * cut - 1, jnp.maximum(step * cut, 1))
    earlier = jnp.tril(jnp.ones((groups, groups), bool), -1) & (each == each[:, None]) | (each > each[:, None])
    begin = jnp.where(earlier, cut, 0).sum(-1, dtype=jnp.int32)
    t = jnp.arange(-(-(pairs + (block_m - 1) * min(groups, pairs)) // block_m), dtype=jnp.int32)[:, None]
    inside = (begin <= t) & (t < begin + cut)
    group, t = jnp.where(inside, jnp.arange(groups, dtype=jnp.int32), 0).sum(-1, dtype=jnp.int32), t[:, 0]
    done = (t - begin[group]) * each[group]
    return Tiles(group, first[group] + done, jnp.minimum(sizes[group] - done, each[group]), cut.sum())


def permute_reference(x: jax.Array, place: jax.Array, rows: int) -> jax.Array:
    """Row place[m, c] is x[m], for all m and c; other rows are zeros."""
    at = jnp.where(place < 0, rows, place).reshape(-1)
    return jnp.zeros((rows, x.shape[1]), x.dtype).at[at].set(jnp.repeat(x, place.shape[1], axis=0), mode="drop")


def combine_reference(y: jax.Array, place: jax.Array, weights: jax.Array) -> jax.Array:
    """[M, H] of y [rows, H]: the sum over c of weights[m, c] * y[place[m, c]], in float32; -1 adds nothing."""
    chosen = jnp.where((place >= 0)[..., None], y[jnp.maximum(place, 0)].astype(jnp.float32), 0)
    return (chosen * weights[..., None].astype(jnp.float32)).sum(1).astype(y.dtype)


def _part(columns: int) -> tuple[int, int] | None:
    """Columns that a block of threads takes at a time, and how many a thread loads at once. None: they do not fit."""
    each = next((n for n in (8, 4, 2, 1) if columns % (n * LANES) == 0), None)
    return None if each is None else (each * LANES, each)


def _call(body: Any, out: tuple[int, ...], dtype: Any, grid: tuple[int, ...], interpret: Any) -> Any:
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        grid=grid,
        grid_names=("token", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )


def permute(x: jax.Array, place: jax.Array, rows: int, *, interpret: Any = None) -> jax.Array:
    """As the reference, but rows that no pair has keep what was in memory. x is read once, and nothing of it that has
    no row is written."""
    part = _part(x.shape[1])
    if part is None:
        return permute_reference(x, place, rows)
    size, each = part

    def body(x_g: Any, place_g: Any, out_g: Any) -> None:
        m, columns = jax.lax.axis_index("token"), pl.ds(jax.lax.axis_index("part") * size, size)
        values = plgpu.load(x_g.at[m, columns], layout=plgpu.Layout.WG_STRIDED((size,), vec_size=each))
        for c in range(place.shape[1]):
            at = place_g[m, c]

            @pl.when(at >= 0)
            def _(at: jax.Array = at) -> None:
                out_g[at, columns] = values

    grid = (x.shape[0], x.shape[1] // size)
    return _call(body, (rows, x.shape[1]), x.dtype, grid, interpret)(x, place)


def combine(
    y: jax.Array, place: jax.Array, weights: jax.Array, residual: jax.Array | None = None, *, interpret: Any = None
) -> jax.Array:
    """As the reference, plus residual [M, H]."""
    part = _part(y.shape[1])
    if part is None:
        out = combine_reference(y, place, weights)
        return out if residual is None else residual + out
    size, each = part
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=each)

    def body(y_g: Any, place_g: Any, weights_g: Any, *rest: Any) -> None:
        *residual_g, out_g = rest
        m, columns = jax.lax.axis_index("token"), pl.ds(jax.lax.axis_index("part") * size, size)
        total = jnp.zeros((size,), jnp.float32)
        for x_g in residual_g:
            total += plgpu.load(x_g.at[m, columns], layout=layout).astype(jnp.float32)
        at = [place_g[m, c] for c in range(place.shape[1])]
        read = [plgpu.load(y_g.at[jnp.maximum(a, 0), columns], layout=layout) for a in at]
        for c, (a, row) in enumerate(zip(at, read, strict=True)):
            total += jnp.where(a >= 0, row.astype(jnp.float32) * weights_g[m, c], 0.0)
        out_g[m, columns] = total.astype(y.dtype)

    grid = (place.shape[0], y.shape[1] // size)
    arguments = y, place, weights.astype(jnp.float32), *(() if residual is None else (residual,))
    return _call(body, (place.shape[0], y.shape[1]), y.dtype, grid, interpret)(*arguments)
