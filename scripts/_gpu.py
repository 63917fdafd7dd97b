"""What the GPU benchmarks share: timing of many calls in one program, the card's ceilings, drawn routings, poison."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels.grouped_gemm import Tiles, from_blocks, swiglu
from moe_jax.kernels.routing import cut_tiles

BF16 = jnp.bfloat16


@dataclass(frozen=True)
class Gemm:
    """A grouped GEMM; `columns` count gate and up where `activate`."""

    name: str
    groups: int
    k: int
    columns: int
    activate: bool


GEMMS = (
    Gemm("Qwen3-30B up", 128, 2048, 1536, True),
    Gemm("Qwen3-30B down", 128, 768, 2048, False),
    Gemm("DSV3 at EP8 up", 32, 7168, 4096, True),
    Gemm("DSV3 at EP8 down", 32, 2048, 7168, False),
    Gemm("Mixtral up", 8, 4096, 28672, True),
    Gemm("Mixtral down", 8, 14336, 4096, False),
)


@partial(jax.jit, static_argnames=("shape", "scale"))
def _normal(seed: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, BF16) * BF16(scale)


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """bfloat16 random numbers, drawn on the device."""
    return _normal(jnp.uint32(seed), shape, scale)  # were the seed no argument, XLA would draw them while it compiles


def draw_sizes(rng: np.random.Generator, rows: int, groups: int, kind: str) -> np.ndarray:
    """Rows of each group: drawn evenly, or ("zipf") with weights 1 / rank^0.8 in random order."""
    p = np.ones(groups) if kind == "uniform" else rng.permutation(1 / np.arange(1, groups + 1) ** 0.8)
    return rng.multinomial(rows, p / p.sum())


@partial(jax.jit, static_argnums=(1, 2))
def _cut(sizes: jax.Array, rows: int, block_m: int) -> Tiles:
    return cut_tiles(sizes, rows, block_m)


def tiles_of(sizes: np.ndarray, block_m: int) -> Tiles:
    """The tiles of groups of these sizes, as many as any routing of so many rows may need."""
    return _cut(jnp.asarray(sizes, jnp.int32), int(sizes.sum()), block_m)


def worst_error(x: jax.Array, blocks: jax.Array, tiles: Tiles, y: jax.Array, block_m: int, activate: bool) -> jax.Array:
    """The largest relative error of a tile of y, against float32; infinite where y is not a number."""

    def one(i: jax.Array, most: jax.Array) -> jax.Array:
        at = jnp.arange(block_m)
        live = (at < tiles.size[i])[:, None]
        a, found = (v.at[tiles.row[i] + at].get(mode="clip").astype(jnp.float32) for v in (x, y))
        w = from_blocks(blocks[0, tiles.group[i]], activate).astype(jnp.float32)
        expected = jnp.dot(a, w, precision="highest")
        expected = jnp.where(live, swiglu(expected) if activate else expected, 0)
        apart = jnp.linalg.norm(jnp.where(live, found, 0) - expected) / jnp.linalg.norm(expected)
        return jnp.maximum(most, jnp.where(apart < jnp.inf, apart, jnp.inf))

    return jax.lax.fori_loop(0, tiles.count, one, jnp.float32(0))


def check(x: Any, blocks: Any, tiles: Any, block_m: int, activate: bool) -> Any:
    """`worst_error` compiled for arguments of these shapes; it is called with x, blocks, tiles and y."""
    columns = math.prod(blocks.shape[2:-1:2]) // (2 if activate else 1)
    y = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    f = jax.jit(partial(worst_error, block_m=block_m, activate=activate))
    return f.lower(x, blocks, tiles, y).compile({"xla_gpu_enable_triton_gemm": False})


def poison() -> None:
    """Fill memory that the next outputs will be taken from with NaN, so that what is not written shows."""
    jax.block_until_ready(jnp.full((1 << 31,), jnp.nan, BF16)).delete()


def compile_all(jobs: Sequence[Callable[[], Any]], threads: int = 12) -> list[Any]:
    """The results of all jobs, run side by side; an exception in place of one that failed."""

    def attempt(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as e:  # noqa: BLE001  a configuration that a compiler refuses is a row in the table
            return e

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(attempt, jobs))


def program(f: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Any:
    """One compiled program that calls f with each of the arguments, one after the other; they may be shapes only."""
    once = jax.jit(f)  # lowered once, not for each call: a Pallas kernel takes its time
    return jax.jit(lambda a: [once(*x) for x in a]).lower(list(arguments)).compile()


def seconds(compiled: Any, arguments: Sequence[tuple[Any, ...]], at_least: float = 0.06, rounds: int = 3) -> float:
    """Wall time of one call among many without a pause, the median of the rounds; the card gets as warm as at work."""

    def run(n: int) -> float:
        begun, last = time.perf_counter(), None
        for _ in range(n):
            last = compiled(list(arguments))  # only one result is kept: many would fill the memory
        jax.block_until_ready(last)
        return (time.perf_counter() - begun) / n

    run(2)
    n = max(2, round(at_least / rounds / run(2)))
    return statistics.median(run(n) for _ in range(rounds)) / len(arguments)


def ceilings(smaller: int = 1) -> tuple[float, float]:
    """FLOP/s of cuBLAS at 8192^3 in bfloat16, random data, and bytes/s, read and written, of copying 2 GiB, the better
    of a copy and a kernel that scales. smaller: each axis and the bytes by so much, for a CPU."""
    n, size = 8192 // smaller, (1 << 30) // smaller
    a = [(normal(0, n, n), normal(1, n, n))]
    flops = 2 * n**3 / seconds(program(jnp.matmul, a), a, 0.5)
    b = [(normal(2, size),)]
    fastest = min(seconds(program(f, b), b, 0.2) for f in (jnp.copy, lambda x: x * 2))
    return flops, 2 * 2 * size / fastest
