"""Which configuration of the grouped GEMM is the best known for a shape: `tuned.json`, and a rule for other shapes.

scripts/tune_grouped_gemm.py measures and writes the table.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moe_jax.kernels.grouped_gemm import BLOCK_K, Config, block_rows

TABLE = Path(__file__).with_name("tuned.json")
DENSE = 96  # rows of a group from which on arithmetic is the bound, not reading weights
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads of an H100 or H200 may use


@dataclass(frozen=True)
class Shape:
    """Of a grouped GEMM. `rows` are those of a group with its fair share; `columns` count gate and up."""

    groups: int
    k: int
    columns: int
    rows: int
    activate: bool
    weight_bytes: int = 2


def shared_memory(c: Config, shape: Shape) -> int:
    """Bytes that the kernel takes."""
    b = block_rows(shape.columns, shape.activate)
    stage = c.blocks_k * BLOCK_K * (2 * c.block_m + shape.weight_bytes * c.together * b)
    return c.stages * (stage + 16) + c.consumers * c.buffers * c.block_m * 128 + 1024


def fits(c: Config, shape: Shape) -> bool:
    """Whether the kernel can run so."""
    b = block_rows(shape.columns, shape.activate)
    nb, kb = shape.columns // b, shape.k // BLOCK_K
    return (
        nb % (c.together * c.cluster) == 0
        and all(w % (8 * c.cluster) == 0 for w in c.widths)
        and kb % c.blocks_k == 0
        and c.blocks_k * b <= 256
        and c.stages > 1
        and (shape.weight_bytes == 2 or (c.blocks_k == 2 and c.cluster == 1 and c.block_m <= 128))
        and c.block_m * (b // 64) <= 384  # accumulators in registers
        and shared_memory(c, shape) <= SHARED_MEMORY
    )


def _widths(most: int) -> tuple[int, ...]:
    return tuple(w for w in (8, 16, 32, 64, 96, 128, 160, 192) if w <= most)


def _fine(most: int) -> tuple[int, ...]:
    return tuple(range(16, most + 1, 16))  # each is compiled; finer ones would save less than 1 % of the rows


def candidates(shape: Shape) -> list[Config]:
    """What is worth measuring for a shape, by its regime; first what is likely to do where nothing was measured."""
    out = []
    b = block_rows(shape.columns, shape.activate)
    sizes = [32, 64, 128, 192] if shape.weight_bytes == 2 else [32, 64, 128]
    likely = next((m for m in (32, 64) if m >= 3 * shape.rows), 128)  # so that a group rarely takes two tiles
    sizes.sort(key=lambda m: m != likely)
    if shape.weight_bytes == 1:  # widened in registers, which are fewer for it
        for block_m in sizes:
            for consumers, stages, panel in ((2, 3, 8), (2, 4, 16), (1, 4, 8)):
                out.append(Config(block_m, _widths(block_m), consumers, 2, stages, panel))
    elif shape.rows > DENSE:
        for block_m, stages, panel in ((192, 4, 8), (128, 5, 8), (128, 6, 8), (192, 4, 4), (128, 5, 4)):
            out.append(Config(block_m, _fine(block_m), 2, 1, stages, panel, in_turn=True))
        out.append(replace(out[1], cluster=2))
        both = [
            Config(192, _fine(192), 2, 1, 3, 8),
            Config(128, _fine(128), 2, 1, 4, 8),
            Config(128, _fine(128), 2, 1, 4, 16),
        ]
        # Tiles in turn hide what follows the products, which is much where K is small, but read each row more often.
        out = [*out, *both] if shape.k <= (2048 if shape.activate else 1024) else [*both, *out]
    else:
        for block_m in sizes:
            # Where few groups are hit, narrow tiles occupy more of the processor.
            kinds = ((2, 1), (1, 1), (1, 2), (2, 2)) if shape.rows > 1 else ((1, 1), (1, 2), (2, 1), (2, 2))
            for consumers, blocks_k in kinds:
                stage = blocks_k * BLOCK_K * 2 * (block_m + consumers * b)
                for kilobytes in (192, 144):
                    out.append(Config(block_m, _widths(block_m), consumers, blocks_k, kilobytes * 1024 // stage, 1))
        out.append(replace(out[0], panel=8))  # a group's tiles find its weights in the L2 cache
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
    """The configuration of the nearest measured shape, if it can run this one; else the likely one.

    Near means a like number of rows a group, within a factor of 2, which decides the regime, and then like K, columns
    and groups, all by their ratio. Raises ValueError where nothing can run it.
    """

    def ratio(a: int, b: int) -> float:
        return abs(math.log(a / b))

    def distance(other: Shape) -> float:
        sizes = ratio(shape.k, other.k) + ratio(shape.columns, other.columns) + ratio(shape.groups, other.groups)
        return 4 * rows_apart(other) + sizes

    def rows_apart(other: Shape) -> float:
        return ratio(shape.rows, other.rows)

    near = [
        (distance(other), i, c)
        for i, (other, c) in enumerate(_table())
        if (shape.activate, shape.weight_bytes) == (other.activate, other.weight_bytes)
        and (shape.rows > DENSE) == (other.rows > DENSE)
        and rows_apart(other) <= math.log(2)
        and fits(c, shape)
    ]
    if near:
        return min(near)[2]
    likely = candidates(shape)
    if not likely:
        raise ValueError(f"{shape}: expected K and columns to be multiples of 64 (128 with 8-bit weights)")
    return likely[0]
