"""Measures the candidates for each shape on this GPU and writes the best to moe_jax/kernels/tuned.json.

    python scripts/tune_grouped_gemm.py [--only "Qwen3"] [--rows 8 64 512 2048 16384 65536] [--out FILE]

A program's calls have rows drawn evenly and by Zipf's law in turns: a group that takes two tiles may cost a third more.
Every candidate's result is compared with float32 before it may win. Entries of other shapes in the file stay.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu import GEMMS, Gemm, check, compile_all, draw_sizes, normal, poison, program, seconds, tiles_of

from moe_jax.kernels import tuning
from moe_jax.kernels.grouped_gemm import grouped_gemm, to_blocks
from moe_jax.kernels.routing import padded_rows


@dataclass(frozen=True)
class Case:
    """A shape, what is to be measured at it, and the programs and checks of each candidate."""

    gemm: Gemm
    rows: int
    shape: tuning.Shape
    configs: list[tuning.Config]
    built: list[tuple[Any, Any]]


def calls_of(rows: int) -> int:
    return 2 if rows > 8192 else 8


def cases_of(gemms: list[Gemm], all_rows: list[int]) -> list[Case]:
    """All programs, compiled side by side before anything is measured."""
    like = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    cases, jobs = [], []
    for gemm in gemms:
        cut = partial(to_blocks, swiglu=gemm.activate)
        blocks = jax.eval_shape(cut, like((1, gemm.groups, gemm.k, gemm.columns)))
        for rows in all_rows:
            shape = tuning.Shape(gemm.groups, gemm.k, gemm.columns, max(1, rows // gemm.groups), gemm.activate)
            cases.append(Case(gemm, rows, shape, tuning.candidates(shape), []))
            x = like((padded_rows(rows, gemm.groups), gemm.k))
            for c in cases[-1].configs:
                tiles = tiles_of(drawn(gemm, rows)[0], c.block_m)
                f = partial(grouped_gemm, config=c, activate=gemm.activate)
                jobs.append(partial(program, f, [(x, blocks, tiles, jnp.int32(0))] * calls_of(rows)))
                jobs.append(partial(check, x, blocks, tiles, c.block_m, gemm.activate))
    built = iter(compile_all(jobs))
    for case in cases:
        case.built.extend((next(built), next(built)) for _ in case.configs)
    return cases


def drawn(gemm: Gemm, rows: int) -> list[np.ndarray]:
    """Rows of each group in each call."""
    rng = np.random.default_rng(0)
    return [draw_sizes(rng, rows, gemm.groups, ("uniform", "zipf")[i % 2]) for i in range(calls_of(rows))]


def tune(case: Case, blocks: jax.Array) -> list[tuple[float, tuning.Config]]:
    """Seconds of each candidate that came out right, fastest first."""
    gemm, rows = case.gemm, case.rows
    xs = [normal(i, padded_rows(rows, gemm.groups), gemm.k) for i in range(calls_of(rows))]
    found = []
    for config, (compiled, error_of) in zip(case.configs, case.built, strict=True):
        failed = [b for b in (compiled, error_of) if isinstance(b, Exception)]
        if failed:
            print(f"  {config}: {type(failed[0]).__name__} {str(failed[0])[:200]}")
            continue
        tiles = [tiles_of(sizes, config.block_m) for sizes in drawn(gemm, rows)]
        arguments = [(x, blocks, t, jnp.int32(0)) for x, t in zip(xs, tiles, strict=True)]
        poison()
        error = float(error_of(xs[-1], blocks, tiles[-1], compiled(arguments)[-1]))
        if not error < 3e-3:
            print(f"  {config}: wrong, relative error {error:.1e}")
            continue
        found.append((seconds(compiled, arguments), config))
        print(f"  {found[-1][0] * 1e6:8.1f} us  {config}", flush=True)
    return sorted(found, key=lambda f: f[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of shapes whose name has this in it")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 512, 2048, 16384, 65536])
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    args = parser.parse_args()
    entries = {json.dumps(e["shape"]): e for e in json.loads(tuning.TABLE.read_text())["entries"]}
    held: dict[str, jax.Array] = {}  # the weights of the shape that is being measured
    for case in cases_of([g for g in GEMMS if args.only in g.name], args.rows):
        g = case.gemm
        if g.name not in held:
            held.clear()
            plain = normal(1, 1, g.groups, g.k, g.columns, scale=0.02)
            held[g.name] = jax.jit(partial(to_blocks, swiglu=g.activate))(plain)
            del plain
        print(f"{g.name}, {case.rows} rows", flush=True)
        found = tune(case, held[g.name])
        if not found:
            continue
        new = tuning.entry(case.shape, found[0][1], found[0][0] * 1e6)
        entries[json.dumps(new["shape"])] = new
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        lines = ",\n".join(f"  {json.dumps(e)}" for e in entries.values())
        args.out.write_text(f'{{\n "device": {json.dumps(device)},\n "entries": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
