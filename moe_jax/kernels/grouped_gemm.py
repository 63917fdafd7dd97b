"""Grouped GEMM for Hopper: the rows of each group times that group's weights, optionally through SwiGLU.

Weights take wgmma's 64-row side and tokens the narrow one, so one body serves both regimes: a tile of 8 rows costs 8
rows in decode, which is bound by reading weights, and a group's last tile in prefill costs what it holds rounded up to
one of a few widths. A producer warpgroup keeps a ring of TMA loads running across tiles; one or two consumers multiply.

Weights are kept in blocks that a single copy of consecutive bytes brings in, see `to_blocks`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # of jax 0.11; 0.10, which type checks may see, has other signatures
BLOCK_K = 64  # columns of a block of weights
ALIGN = 8  # groups begin at multiples of so many rows
TINY = 1e-20  # the least scale of 8-bit weights: what is multiplied with less is nothing
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
    cluster: int = 1  # blocks of threads that share the copies of a tile's rows, each with columns of its own
    in_turn: bool = False  # each consumer has tiles of its own: one multiplies while another writes its results out

    @property
    def together(self) -> int:
        """Blocks of weights in a tile."""
        return 1 if self.in_turn else self.consumers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """Which rows belong to which group, cut into tiles. Those from `count` on are not looked at."""

    group: jax.Array  # [tiles] int32
    row: jax.Array  # [tiles] int32, first row, a multiple of ALIGN
    size: jax.Array  # [tiles] int32, rows, 1 to block_m
    count: jax.Array  # [] int32


def tile_step(block_m: int) -> int:
    """What the heights of a group's tiles but the last are multiples of."""
    return math.gcd(block_m, 16)


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


def scales_to_blocks(scales: jax.Array, swiglu: bool) -> jax.Array:
    """Scales of 128 by 128 weights, [..., K / 128, N / 128], as the kernel reads them: [..., N / B, B / 64, K / 128].

    A scale of what is 64 columns of a block. With `swiglu`, N is gates, then ups, each a multiple of 128.
    """
    *lead, k, n = scales.shape
    d = len(lead)
    turned = jnp.swapaxes(scales, -1, -2)
    if not swiglu:
        return jnp.broadcast_to(turned[..., None, :], (*lead, n, 2, k))
    halves = turned.reshape(*lead, 2, n // 2, k)
    return jnp.repeat(jnp.moveaxis(halves, d, d + 1), 2, axis=d)


def dequantise(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 blocks of 8-bit blocks and `scales_to_blocks`."""
    b = blocks.shape[-2]
    each = jnp.repeat(jnp.repeat(jnp.swapaxes(scales, -1, -2), 2, axis=-2), 64, axis=-1)  # [..., N / B, K / 64, B]
    return blocks.astype(jnp.float32) * each[..., :b, None]


def quantise(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., K, N], multiples of 128, as float8_e4m3fn and float32 scales [..., K / 128, N / 128] of 128 by 128 blocks,
    as DeepSeek-V3's checkpoints have them (arXiv 2412.19437, section 3.3.2)."""
    *lead, k, n = weights.shape
    tiles = weights.astype(jnp.float32).reshape(*lead, k // 128, 128, n // 128, 128)
    scale = jnp.abs(tiles).max((-3, -1)) / float(jnp.finfo(jnp.float8_e4m3fn).max)
    scale = jnp.where(scale == 0, 1, scale)
    return (tiles / scale[..., :, None, :, None]).astype(jnp.float8_e4m3fn).reshape(weights.shape), scale


def swiglu(x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * up


def grouped_gemm_reference(
    x: jax.Array,
    blocks: jax.Array,
    tiles: Tiles,
    layer: jax.Array,
    config: Config,
    activate: bool = False,
    scales: jax.Array | None = None,
) -> jax.Array:
    """Plain JAX, in float32; rows of no tile come out as zeros."""
    del config
    wide = blocks[layer].astype(jnp.float32) if scales is None else dequantise(blocks[layer], scales[layer])
    w = from_blocks(wide, activate)
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
    scales: jax.Array | None = None,
    *,
    sms: int = SMS,
    interpret: Any = None,
) -> jax.Array:
    """y[r] = x[r] @ weights of r's group, or SwiGLU of that; rows of no tile keep what was in memory.

    x [M, K] bfloat16, M a multiple of 8; blocks [L, G, N / B, K / 64, B, 64], see `to_blocks`, bfloat16, or
    float8_e4m3fn with `scales` as `scales_to_blocks` gives them (then stages are of 128 columns: config.blocks_k 2);
    layer [] int32. Returns [M, N], or [M, N / 2] with `activate`, bfloat16, accumulated in float32.
    """
    m, k = x.shape
    layers, groups, nb, kb, b, _ = blocks.shape
    c = config
    if k != kb * BLOCK_K:
        raise ValueError(f"x has {k} columns, expected {kb * BLOCK_K}: the weights' rows")
    if nb % (c.together * c.cluster) or kb % c.blocks_k or c.blocks_k * b > 256:
        raise ValueError(f"{c}: does not divide {nb} x {kb} blocks of {b} x {BLOCK_K}")
    if (scales is not None) != (blocks.dtype == jnp.float8_e4m3fn) or (scales is not None and c.blocks_k != 2):
        raise ValueError(
            f"weights {blocks.dtype}, blocks_k {c.blocks_k}: expected float8_e4m3fn and 2 with scales only"
        )
    if layers * groups * nb * kb * b >= 2**31:
        raise ValueError(f"weights {blocks.shape}: more than 2^31 rows of blocks; keep fewer layers in an array")
    if m % ALIGN or c.block_m % ALIGN or c.widths[-1] != c.block_m:
        raise ValueError(f"{m} rows and {c}: expected multiples of {ALIGN}, the last of widths being block_m")
    pieces = 1 if activate else b // 64  # 64 output columns each
    columns, kt, dtype = nb * pieces * 64, kb // c.blocks_k, x.dtype
    across, clusters = nb // (c.together * c.cluster), sms // c.cluster
    halves = b // 64
    shared = "block" if c.cluster > 1 else None
    widths = [(low, high) for low, high in zip((0, *c.widths), c.widths, strict=False)]

    def place(t: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row tile and column tile of the t-th tile: panels of row tiles, and in them column by column."""
        panel = lax.div(t, c.panel * across)
        r = t - panel * c.panel * across
        high = jnp.maximum(jnp.minimum(c.panel, count - panel * c.panel), 1)  # no tile at all is also a count
        return panel * c.panel + lax.rem(r, high), lax.div(r, high)

    def body(*refs: Any, xs: Any, ws: Any, ys: Any, full: Any, empty: Any) -> None:
        x_g, w_g, *scale_g, group_g, row_g, size_g, count_g, layer_g, y_g = refs
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
        count, layer = count_g[0], layer_g[0]
        mine = lax.div(count * across - sm + clusters - 1, clusters)

        def tile(i: jax.Array) -> tuple[jax.Array, ...]:
            """Column tile, first row, rows and group of the i-th of this block's tiles, or of any if there is none:
            asked for a tile ahead, so that nobody waits for it."""
            mi, ni = place(jnp.minimum(sm + i * clusters, jnp.maximum(count * across - 1, 0)), count)
            if c.cluster > 1:
                ni = ni * c.cluster + lax.axis_index("block")
            return ni, row_g[mi], size_g[mi], group_g[mi]

        def filled(i: jax.Array, slot: jax.Array) -> Any:
            """A slot's barrier for the i-th tile. Consumers count the phases they wait for, so each has its own."""
            return full.at[lax.rem(i, c.consumers) * c.stages + slot] if c.in_turn else full.at[slot]

        @pl.when(wg == c.consumers)
        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def per_tile(i: jax.Array, this: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                ahead = tile(i + 1)
                ni, row, size, group = this
                first = ((layer * groups + group) * nb + ni * c.together) * kb * b

                def per_stage(ki: jax.Array, _: None) -> None:
                    step = i * kt + ki
                    slot = lax.rem(step, c.stages)
                    ready = filled(i, slot)

                    @pl.when(step >= c.stages)
                    def _() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    for j in range(c.together):
                        at = first + (j * kb + ki * c.blocks_k) * b
                        plgpu.copy_gmem_to_smem(w_g.at[pl.ds(at, c.blocks_k * b)], ws.at[slot, j], ready)
                    for low, high in widths:

                        @pl.when((size > low) & (size <= high))
                        def _(high: int = high) -> None:
                            for kk in range(c.blocks_k):
                                from_ = x_g.at[pl.ds(row, high), pl.ds((ki * c.blocks_k + kk) * BLOCK_K, BLOCK_K)]
                                plgpu.copy_gmem_to_smem(
                                    from_, xs.at[slot, kk, pl.ds(0, high)], ready, collective_axes=shared
                                )

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
            begin, every = (wg, c.consumers) if c.in_turn else (jnp.int32(0), 1)
            part = jnp.int32(0) if c.in_turn else wg  # which of a tile's blocks of weights

            def per_tile(j: jax.Array, this: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                i = begin + j * every
                ahead = tile(i + every)
                ni, row, size, group = this
                if scales is None:
                    store(multiply(i, size), ni, row, size)
                else:
                    block = (layer * groups + group) * nb + ni * c.together + part
                    for low, high in widths:

                        @pl.when((size > low) & (size <= high))
                        def _(high: int = high) -> None:
                            store(multiply_scaled(i, high, block), ni, row, size)

                return ahead

            def multiply(i: jax.Array, size: jax.Array) -> list[jax.Array]:
                """Each 64 rows of weights times the i-th tile's rows, transposed; columns behind those are zeros."""

                def scope(*accs: Any) -> list[jax.Array]:
                    def of_width(width: int) -> None:
                        def per_stage(ki: jax.Array, _: None) -> None:
                            step = i * kt + ki
                            slot = lax.rem(step, c.stages)
                            plgpu.barrier_wait(filled(i, slot))
                            for kk in range(c.blocks_k):
                                for h, acc in enumerate(accs):
                                    plgpu.wgmma(
                                        acc.at[:, pl.ds(0, width)],
                                        ws.at[slot, part, pl.ds(kk * b + h * 64, 64)],
                                        xs.at[slot, kk, pl.ds(0, width)].T,
                                    )
                            plgpu.wgmma_wait(halves * c.blocks_k)  # the stage before this one has been read

                            @pl.when(ki > 0)
                            def _() -> None:
                                plgpu.barrier_arrive(empty.at[lax.rem(step + c.stages - 1, c.stages)])

                        lax.fori_loop(0, kt, per_stage, None)
                        plgpu.wgmma_wait(0)

                    # Only this is there for each width: the rest would take its time to compile as often.
                    narrower = sum((size > w).astype(jnp.int32) for w in c.widths[:-1])
                    lax.switch(narrower, [partial(of_width, w) for w in c.widths])
                    plgpu.barrier_arrive(empty.at[lax.rem((i + 1) * kt - 1, c.stages)])
                    return [acc[...] for acc in accs]

                return pl.run_scoped(scope, *[plgpu.ACC((64, c.block_m), jnp.float32)] * halves)

            def multiply_scaled(i: jax.Array, width: int, block: jax.Array) -> list[jax.Array]:
                """The same with 8-bit weights, widened in registers, which is exact. Sums are kept divided by the scale
                of the stage that is added, so that they can stay in the accumulators."""

                def scale(ki: jax.Array) -> list[jax.Array]:
                    at = [(block * halves + h) * kt + jnp.minimum(ki, kt - 1) for h in range(halves)]
                    return [jnp.maximum(scale_g[0][j], TINY) for j in at]

                def per_stage(ki: jax.Array, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                    sums, last, now = state
                    ahead = scale(ki + 1)
                    slot = lax.rem(i * kt + ki, c.stages)
                    plgpu.barrier_wait(filled(i, slot))
                    sums = add(slot, width, [a * (old / s) for a, old, s in zip(sums, last, now, strict=True)])
                    plgpu.barrier_arrive(empty.at[slot])
                    return sums, now, ahead

                zeros = plgpu.layout_cast(jnp.zeros((64, width), jnp.float32), plgpu.Layout.WGMMA)
                first = scale(jnp.int32(0))
                sums, last, _ = lax.fori_loop(0, kt, per_stage, ([zeros] * halves, first, first))
                return [a * s for a, s in zip(sums, last, strict=True)]

            def add(slot: jax.Array, width: int, sums: list[jax.Array]) -> list[jax.Array]:
                """Each 64 rows of a stage's 8-bit weights times its rows, added to sums [64, width]."""
                order = [(h, kk) for kk in range(c.blocks_k) for h in range(halves)]

                def multiply(accs: Any) -> None:
                    for h, kk in order:
                        from_ = ws.at[slot, part, pl.ds(kk * b + h * 64, 64)]
                        w = plgpu.load(from_, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
                        # Hopper widens to float16 in one instruction, and from there in two; to bfloat16 in none.
                        w = plgpu.layout_cast(
                            w.astype(jnp.float16).astype(jnp.float32).astype(dtype), plgpu.Layout.WGMMA
                        )
                        plgpu.wgmma(accs[h], w, xs.at[slot, kk, pl.ds(0, width)].T)
                    plgpu.wgmma_wait(0)

                if interpret is None:
                    return pl.run_state(multiply)([plgpu.ACC.init(a) for a in sums])
                for h, kk in order:  # the interpreter (jax 0.11.2) multiplies only what is in shared memory
                    w = ws[slot, part, pl.ds(kk * b + h * 64, 64)].astype(dtype)
                    sums[h] += jnp.dot(w, xs[slot, kk, pl.ds(0, width)].T).astype(jnp.float32)
                plgpu.commit_smem()  # for its race detector, to which these are reads that a copy cannot wait for
                return sums

            def store(found: list[jax.Array], ni: jax.Array, row: jax.Array, size: jax.Array) -> None:
                """Write the first `size` columns of what was found, as rows, to y from `row` on."""
                width = found[0].shape[1]
                for p in range(pieces):
                    column, buffer = ((ni * c.together + part) * pieces + p) * 64, p % c.buffers
                    if buffer == 0:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for at in range(0, width, 64):
                        some = min(64, width - at)

                        @pl.when(size > at)
                        def _(
                            at: int = at, some: int = some, p: int = p, column: Any = column, buffer: int = buffer
                        ) -> None:
                            y = found[p][:, at : at + some]
                            if activate:
                                # A quotient would be IEEE's, which takes ten times as long.
                                r = lax.rsqrt(1 + jnp.exp(-y))
                                y = y * r * r * found[1][:, at : at + some]
                            ys.at[wg, buffer, pl.ds(at, some)].T[...] = y.astype(dtype)
                            plgpu.commit_smem()

                            def write(first: int, rows: int) -> None:
                                to = y_g.at[pl.ds(row + first, rows), pl.ds(column, 64)]
                                plgpu.copy_smem_to_gmem(ys.at[wg, buffer, pl.ds(first, rows)], to)

                            # A copy's shape is static: all of these rows, or as many eights as there are.
                            whole = size > at + some - ALIGN
                            pl.when(whole)(partial(write, at, some))
                            for first in range(at, at + some - ALIGN, ALIGN):
                                pl.when(jnp.logical_not(whole) & (size > first))(partial(write, first, ALIGN))

            lax.fori_loop(0, lax.div(mine - begin + every - 1, every), per_tile, tile(begin))
            plgpu.wait_smem_to_gmem(0)

    stage = (c.stages, c.together)
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, columns), dtype),
        grid=(clusters,),
        grid_names=("sm",),
        cluster=(c.cluster,) if shared else (),
        cluster_names=(shared,) if shared else (),
        num_threads=c.consumers + 1,
        thread_name="wg",
        scratch_types=dict(
            xs=plgpu.SMEM((c.stages, c.blocks_k, c.block_m, BLOCK_K), dtype, transforms=_transforms(BLOCK_K, dtype)),
            ws=plgpu.SMEM((*stage, c.blocks_k * b, BLOCK_K), blocks.dtype, transforms=_transforms(64, blocks.dtype)),
            ys=plgpu.SMEM((c.consumers, c.buffers, c.block_m, 64), dtype, transforms=_transforms(64, dtype)),
            full=plgpu.Barrier(
                num_arrivals=c.together + c.blocks_k, num_barriers=c.stages * (c.consumers if c.in_turn else 1)
            ),
            empty=plgpu.ClusterBarrier(collective_axes=(shared,), num_arrivals=c.together, num_barriers=c.stages)
            if shared
            else plgpu.Barrier(num_arrivals=c.together, num_barriers=c.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    scalars = tiles.count.reshape(1), layer.reshape(1)  # apart: putting them together would take a kernel of its own
    weights = (blocks.reshape(-1, BLOCK_K), *(() if scales is None else (scales.reshape(-1),)))
    return run(x, *weights, tiles.group, tiles.row, tiles.size, *scalars)
