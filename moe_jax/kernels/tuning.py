"""Which configuration of the grouped GEMM is the best known for a shape: `tuned.json`, and a rule for other shapes.

scripts/tune_grouped_gemm.py measures and writes the table.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_jax.kernels.grouped_gemm import ALIGN, BLOCK_K, Config, block_rows

TABLE = Path(__file__).with_name("tuned.json")
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads of an H100 or H200 may use


@dataclass(frozen=True)
class Shape:
    """Of a grouped GEMM. `rows` are those of a group with its fair share; `columns` count gate and up."""

    groups: int
    k: int
    columns: int
    rows: int
    activate: bool


def shared_memory(c: Config, shape: Shape, weight_bytes: int = 2) -> int:
    """Bytes that the kernel takes."""
    b = block_rows(shape.columns, shape.activate)
    stage = c.blocks_k * BLOCK_K * (2 * c.block_m + weight_bytes * c.consumers * b)
    return c.stages * (stage + 16) + c.consumers * c.buffers * c.block_m * 128 + 1024


def fits(c: Config, shape: Shape) -> bool:
    """Whether the kernel can run so."""
    b = block_rows(shape.columns, shape.activate)
    nb, kb = shape.columns // b, shape.k // BLOCK_K
    return (
        nb % (c.consumers * c.cluster) == 0
        and all(w % (8 * c.cluster) == 0 for w in c.widths)
        and kb % c.blocks_k == 0
        and c.blocks_k * b <= 256
        and c.stages > 1
        and c.block_m * (b // 64) <= 384  # accumulators in registers
        and shared_memory(c, shape) <= SHARED_MEMORY
    )


def _widths(most: int) -> tuple[int, ...]:
    return tuple(w for w in (8, 16, 32, 64, 96, 128, 160, 192) if w <= most)


def candidates(shape: Shape) -> list[Config]:
    """What is worth measuring for a shape, by its regime, and what serves a shape that nothing was measured for."""
    out = []
    if shape.rows > 96:  # bound by arithmetic
        out.append(Config(128, _widths(128), 1, 1, 5, 8))
        for block_m, stages, buffers in ((192, 3, 1), (128, 4, 1), (128, 3, 2)):
            for panel in (4, 16):
                out.append(Config(block_m, _widths(block_m), 2, 1, stages, panel, buffers))
                out.append(Config(block_m, _widths(block_m)[1:], 2, 1, stages, panel, buffers, cluster=2))
    for block_m in () if out else (32, 64) if shape.rows < 32 else (64, 128):
        for consumers, blocks_k in ((2, 1), (1, 1), (1, 2), (2, 2)):
            stage = blocks_k * BLOCK_K * 2 * (block_m + consumers * block_rows(shape.columns, shape.activate))
            for kilobytes in (192, 144):
                out.append(Config(block_m, _widths(block_m), consumers, blocks_k, kilobytes * 1024 // stage, 1))
    return [c for c in dict.fromkeys(out) if fits(c, shape)]


@cache
def _table() -> tuple[tuple[Shape, Config], ...]:
    def config(raw: dict[str, Any]) -> Config:
        return Config(**{**raw, "widths": tuple(raw["widths"])})

    entries = json.loads(TABLE.read_text())["entries"] if TABLE.exists() else []
    return tuple((Shape(**e["shape"]), config(e["config"])) for e in entries)


def entry(shape: Shape, config: Config, microseconds: float) -> dict[str, Any]:
    """As it stands in the table."""
    return {"shape": asdict(shape), "config": asdict(config), "microseconds": round(microseconds, 1)}


def best(shape: Shape) -> Config:
    """The configuration of the nearest measured shape that can run this one.

    Near are first like rows a group, which decide the regime, then like K, columns and groups, all by their ratio.
    """

    def distance(other: Shape) -> float:
        def ratio(a: int, b: int) -> float:
            return abs(math.log(a / b))

        return (
            4 * ratio(max(shape.rows, ALIGN), max(other.rows, ALIGN))
            + ratio(shape.k, other.k)
            + ratio(shape.columns, other.columns)
            + ratio(shape.groups, other.groups)
            + 10 * (shape.activate != other.activate)
        )

    measured = [(distance(other), i, c) for i, (other, c) in enumerate(_table()) if fits(c, shape)]
    if measured:
        return min(measured)[2]
    return (candidates(shape) or [Config(64, _widths(64), 1, 1, 4, 1)])[0]
