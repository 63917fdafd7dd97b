"""What the GPU benchmarks share: timing of many calls in one program, the card's ceilings, drawn routings, poison."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.kernels.grouped_gemm import ALIGN, Tiles

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


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """bfloat16 random numbers, drawn on the device."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape, BF16) * BF16(scale))()


def draw_sizes(rng: np.random.Generator, rows: int, groups: int, kind: str) -> np.ndarray:
    """Rows of each group: drawn evenly, or ("zipf") with weights 1 / rank^0.8 in random order."""
    p = np.ones(groups) if kind == "uniform" else rng.permutation(1 / np.arange(1, groups + 1) ** 0.8)
    return rng.multinomial(rows, p / p.sum())


def tiles_of(sizes: np.ndarray, block_m: int) -> Tiles:
    """The tiles of groups of these sizes, as many as any routing of so many rows may need."""
    rows, groups = int(sizes.sum()), len(sizes)
    first = np.concatenate([[0], np.cumsum(-(-sizes // ALIGN) * ALIGN)])
    per = [-(-n // max(1, -(-n // block_m) * ALIGN)) * ALIGN for n in sizes]
    each = [(g, first[g] + j, min(per[g], n - j)) for g, n in enumerate(sizes) if n for j in range(0, n, per[g])]
    most = -(-(rows + (block_m - 1) * min(groups, rows)) // block_m)
    columns = np.zeros((3, most), np.int32)
    columns[:, : len(each)] = np.array(each, np.int32).T
    group, row, size = (jnp.asarray(c) for c in columns)
    return Tiles(group, row, size, jnp.int32(len(each)))


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
        begun = time.perf_counter()
        jax.block_until_ready([compiled(list(arguments)) for _ in range(n)][-1])
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
