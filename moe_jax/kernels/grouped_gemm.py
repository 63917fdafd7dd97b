"""Grouped GEMM for Hopper: the rows of each group times that group's weights, optionally through SwiGLU.

Weights take wgmma's 64-row side and tokens the narrow one, so one body serves both regimes: a tile of 8 rows costs 8
rows in decode, which is bound by reading weights, and a group's last tile in prefill costs what it holds rounded up to
one of a few widths. A producer warpgroup keeps a ring of TMA loads running across tiles; one or two consumers multiply.

Weights are kept in blocks that a single copy of consecutive bytes brings in, see `to_blocks`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK_K = 64  # columns of a block of weights
ALIGN = 8  # groups begin at multiples of so many rows
SMS = 132  # streaming multiprocessors of an H100 or H200 SXM


@dataclass(frozen=True)
class Config:
    """How the kernel is run; `tuning` knows which is best for a shape."""

    block_m: int  # most rows of a tile; a multiple of 8
    widths: tuple[int, ...]  # rows a tile may be rounded up to, ascending, the last being block_m
    consumers: int = 2  # warpgroups that multiply, each with a block of weights of its own
    blocks_k: int = 1  # blocks of weights in a stage, along K
    stages: int = 4
    panel: int = 8  # row tiles that are visited together with all columns, for the L2 cache
    buffers: int = 1  # for results on their way out, a warpgroup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Which rows belong to which group, cut into tiles. Those from `count` on are not looked at."""

    group: jax.Array  # [tiles] int32
    row: jax.Array  # [tiles] int32, first row, a multiple of ALIGN
    size: jax.Array  # [tiles] int32, rows, 1 to block_m
    count: jax.Array  # [] int32


def block_rows(columns: int, swiglu: bool) -> int:
    """Output columns in a block of weights, gate and up counted apart."""
    return 128 if swiglu or columns % 128 == 0 else 64


def to_blocks(weights: jax.Array, swiglu: bool) -> jax.Array:
    """[..., K, N] as the kernel reads it: [..., N / B, K / 64, B, 64], B consecutive columns (`block_rows`) a block,
    contiguous and K-major. With `swiglu`, N is gates, then as many ups, and a block is 64 of the one and of the other.

    Raises ValueError unless K and N are multiples of 64, and of 128 for N with `swiglu`.
    """
    *lead, k, n = weights.shape
    if k % BLOCK_K or n % (128 if swiglu else 64):
        raise ValueError(f"weights [{k}, {n}]: expected a multiple of 64 and of {128 if swiglu else 64}")
    b, d = block_rows(n, swiglu), len(lead)
    keep = tuple(range(d))
    if swiglu:
        parts = weights.reshape(*lead, k // BLOCK_K, BLOCK_K, 2, n // 128, 64)
        order = (d + 3, d, d + 2, d + 4, d + 1)
    else:
        parts = weights.reshape(*lead, k // BLOCK_K, BLOCK_K, n // b, b)
        order = (d + 2, d, d + 3, d + 1)
    return parts.transpose(*keep, *order).reshape(*lead, n // b, k // BLOCK_K, b, BLOCK_K)


def from_blocks(blocks: jax.Array, swiglu: bool) -> jax.Array:
    """The inverse of `to_blocks`."""
    *lead, nb, kb, b, _ = blocks.shape
    d = len(lead)
    keep = tuple(range(d))
    if swiglu:
        parts = blocks.reshape(*lead, nb, kb, 2, 64, BLOCK_K)
        order = (d + 1, d + 4, d + 2, d, d + 3)
    else:
        parts, order = blocks, (d + 1, d + 3, d, d + 2)
    return parts.transpose(*keep, *order).reshape(*lead, kb * BLOCK_K, nb * b)


def swiglu(x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up


def grouped_gemm_reference(
    x: jax.Array, blocks: jax.Array, tiles: Tiles, layer: jax.Array, config: Config, activate: bool = False
) -> jax.Array:
    """Plain JAX, in float32; rows of no tile come out as zeros."""
    w = from_blocks(blocks[layer], activate).astype(jnp.float32)
    rows = jnp.arange(x.shape[0])
    live = jnp.arange(tiles.group.shape[0]) < tiles.count
    inside = (rows >= tiles.row[:, None]) & (rows < (tiles.row + tiles.size)[:, None]) & live[:, None]
    group = jnp.where(inside.any(0), tiles.group[inside.argmax(0)], -1)
    y = jnp.einsum("mk,gkn->mgn", jnp.where((group >= 0)[:, None], x, 0).astype(jnp.float32), w, precision="highest")
    y = jnp.take_along_axis(y, jnp.maximum(group, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((group >= 0)[:, None], swiglu(y) if activate else y, 0).astype(x.dtype)


def _transforms(columns: int, dtype: Any) -> tuple[Any, Any]:
    bits = columns * jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(bits)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def grouped_gemm(
    x: jax.Array,
    blocks: jax.Array,
    tiles: Tiles,
    layer: jax.Array,
    config: Config,
    activate: bool = False,
    *,
    sms: int = SMS,
    interpret: Any = None,
) -> jax.Array:
    """y[r] = x[r] @ weights of r's group, or SwiGLU of that; rows of no tile keep what was in memory.

    x [M, K] bfloat16, M a multiple of 8; blocks [L, G, N / B, K / 64, B, 64] bfloat16, see `to_blocks`; layer [] int32.
    Returns [M, N], or [M, N / 2] with `activate`, bfloat16, accumulated in float32.
    """
    m, k = x.shape
    layers, groups, nb, kb, b, _ = blocks.shape
    c = config
    if k != kb * BLOCK_K:
        raise ValueError(f"x has {k} columns, expected {kb * BLOCK_K}: the weights' rows")
    if nb % c.consumers or kb % c.blocks_k or c.blocks_k * b > 256:
        raise ValueError(f"{c}: does not divide {nb} x {kb} blocks of {b} x {BLOCK_K}")
    if layers * groups * nb * kb * b >= 2**31:
        raise ValueError(f"weights {blocks.shape}: more than 2^31 rows of blocks; keep fewer layers in an array")
    if m % ALIGN or c.block_m % ALIGN or c.widths[-1] != c.block_m:
        raise ValueError(f"{m} rows and {c}: expected multiples of {ALIGN}, the last of widths being block_m")
    pieces = 1 if activate else b // 64  # 64 output columns each
    columns, kt, dtype = nb * pieces * 64, kb // c.blocks_k, x.dtype
    across = nb // c.consumers
    halves = b // 64
    widths = [(low, high) for low, high in zip((0, *c.widths), c.widths, strict=False)]

    def place(t: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row tile and column tile of the t-th tile: panels of row tiles, and in them column by column."""
        panel = lax.div(t, c.panel * across)
        r = t - panel * c.panel * across
        high = jnp.maximum(jnp.minimum(c.panel, count - panel * c.panel), 1)  # no tile at all is also a count
        return panel * c.panel + lax.rem(r, high), lax.div(r, high)

    def body(*refs: Any, xs: Any, ws: Any, ys: Any, full: Any, empty: Any) -> None:
        x_g, w_g, group_g, row_g, size_g, head_g, y_g = refs
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
        count, layer = head_g[0], head_g[1]
        mine = lax.div(count * across - sm + sms - 1, sms)

        def tile(i: jax.Array) -> tuple[jax.Array, ...]:
            """Column tile, first row, rows and group of the i-th of this block's tiles, or of any if there is none:
            asked for a tile ahead, so that nobody waits for it."""
            mi, ni = place(jnp.minimum(sm + i * sms, jnp.maximum(count * across - 1, 0)), count)
            return ni, row_g[mi], size_g[mi], group_g[mi]

        @pl.when(wg == c.consumers)
        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def per_tile(i: jax.Array, this: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                ahead = tile(i + 1)
                ni, row, size, group = this
                first = ((layer * groups + group) * nb + ni * c.consumers) * kb * b

                def per_stage(ki: jax.Array, _: None) -> None:
                    step = i * kt + ki
                    slot = lax.rem(step, c.stages)

                    @pl.when(step >= c.stages)
                    def _() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    for j in range(c.consumers):
                        at = first + (j * kb + ki * c.blocks_k) * b
                        plgpu.copy_gmem_to_smem(w_g.at[pl.ds(at, c.blocks_k * b)], ws.at[slot, j], full.at[slot])
                    for low, high in widths:

                        @pl.when((size > low) & (size <= high))
                        def _(high: int = high) -> None:
                            for kk in range(c.blocks_k):
                                from_ = x_g.at[pl.ds(row, high), pl.ds((ki * c.blocks_k + kk) * BLOCK_K, BLOCK_K)]
                                plgpu.copy_gmem_to_smem(from_, xs.at[slot, kk, pl.ds(0, high)], full.at[slot])

                lax.fori_loop(0, kt, per_stage, None)
                return ahead

            lax.fori_loop(0, mine, per_tile, tile(jnp.int32(0)))

            def drain(j: jax.Array, _: None) -> None:
                @pl.when(mine * kt > j)
                def _() -> None:
                    plgpu.barrier_wait(empty.at[lax.rem(mine * kt - 1 - j, c.stages)])

            lax.fori_loop(0, c.stages, drain, None)

        @pl.when(wg < c.consumers)
        def consume() -> None:
            plgpu.set_max_registers(232, action="increase")

            def per_tile(i: jax.Array, this: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                ahead = tile(i + 1)
                ni, row, size, _ = this
                for low, high in widths:

                    @pl.when((size > low) & (size <= high))
                    def _(low: int = low, high: int = high) -> None:
                        multiply(i, ni, row, size, low, high)

                return ahead

            def multiply(i: jax.Array, ni: jax.Array, row: jax.Array, size: jax.Array, low: int, width: int) -> None:
                def scope(*accs: Any) -> list[jax.Array]:
                    def per_stage(ki: jax.Array, _: None) -> None:
                        step = i * kt + ki
                        slot = lax.rem(step, c.stages)
                        plgpu.barrier_wait(full.at[slot])
                        for kk in range(c.blocks_k):
                            for h, acc in enumerate(accs):
                                plgpu.wgmma(
                                    acc,
                                    ws.at[slot, wg, pl.ds(kk * b + h * 64, 64)],
                                    xs.at[slot, kk, pl.ds(0, width)].T,
                                )
                        plgpu.wgmma_wait(halves * c.blocks_k)  # the stage before this one has been read

                        @pl.when(ki > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(empty.at[lax.rem(step + c.stages - 1, c.stages)])

                    lax.fori_loop(0, kt, per_stage, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem((i + 1) * kt - 1, c.stages)])
                    return [acc[...] for acc in accs]

                out = pl.run_scoped(scope, *[plgpu.ACC((64, width), jnp.float32)] * halves)
                if activate:
                    gate, up = out
                    r = lax.rsqrt(1 + jnp.exp(-gate))  # a quotient would be IEEE's, which takes ten times as long
                    out = [gate * r * r * up]
                for p, y in enumerate(out):
                    buffer = p % c.buffers
                    if buffer == 0:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    ys.at[wg, buffer, pl.ds(0, width)].T[...] = y.astype(dtype)
                    plgpu.commit_smem()
                    column = ((ni * c.consumers + wg) * pieces + p) * 64
                    # A copy's shape is static: what every tile of this width has, then eights as far as it goes.
                    for at in dict.fromkeys((0, *range(low, width, ALIGN))):
                        rows = low if at == 0 and low else ALIGN

                        @pl.when(size > at)
                        def _(at: int = at, rows: int = rows, column: jax.Array = column, buffer: int = buffer) -> None:
                            to = y_g.at[pl.ds(row + at, rows), pl.ds(column, 64)]
                            plgpu.copy_smem_to_gmem(ys.at[wg, buffer, pl.ds(at, rows)], to)

            lax.fori_loop(0, mine, per_tile, tile(jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)

    stage = (c.stages, c.consumers)
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, columns), dtype),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=c.consumers + 1,
        thread_name="wg",
        scratch_types=dict(
            xs=plgpu.SMEM((c.stages, c.blocks_k, c.block_m, BLOCK_K), dtype, transforms=_transforms(BLOCK_K, dtype)),
            ws=plgpu.SMEM((*stage, c.blocks_k * b, BLOCK_K), blocks.dtype, transforms=_transforms(64, blocks.dtype)),
            ys=plgpu.SMEM((c.consumers, c.buffers, c.block_m, 64), dtype, transforms=_transforms(64, dtype)),
            full=plgpu.Barrier(num_arrivals=c.consumers + c.blocks_k, num_barriers=c.stages),
            empty=plgpu.Barrier(num_arrivals=c.consumers, num_barriers=c.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    head = jnp.stack([tiles.count, layer]).astype(jnp.int32)
    return run(x, blocks.reshape(-1, BLOCK_K), tiles.group, tiles.row, tiles.size, head)
