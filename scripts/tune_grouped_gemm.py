"""Measures the candidates for each shape on this GPU and writes the best to moe_jax/kernels/tuned.json.

    python scripts/tune_grouped_gemm.py [--only "Qwen3"] [--rows 8 64 512 2048 16384 65536] [--out FILE]

Every candidate's result is compared with float32 before it may win. Entries of other shapes in the file stay.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _gpu import GEMMS, Gemm, compile_all, draw_sizes, normal, poison, program, seconds, tiles_of

from moe_jax.kernels import tuning
from moe_jax.kernels.grouped_gemm import from_blocks, grouped_gemm, swiglu, to_blocks
from moe_jax.kernels.routing import padded_rows


def tune(gemm: Gemm, blocks: jax.Array, rows: int, seed: int = 0) -> list[tuple[float, tuning.Config]]:
    """Seconds of each candidate that came out right, fastest first."""
    shape = tuning.Shape(gemm.groups, gemm.k, gemm.columns, max(1, rows // gemm.groups), gemm.activate)
    sizes = draw_sizes(np.random.default_rng(seed), rows, gemm.groups, "uniform")
    m = padded_rows(rows, gemm.groups)
    xs = [normal(seed + i, m, gemm.k) for i in range(2 if rows > 8192 else 8)]
    configs = tuning.candidates(shape)
    cases = [[(x, blocks, tiles_of(sizes, c.block_m), jnp.int32(0)) for x in xs] for c in configs]
    programs = compile_all(
        [
            partial(program, partial(grouped_gemm, config=c, activate=gemm.activate), case)
            for c, case in zip(configs, cases, strict=True)
        ]
    )
    found = []
    for config, case, compiled in zip(configs, cases, programs, strict=True):
        if isinstance(compiled, Exception):
            print(f"  {config}: {type(compiled).__name__} {str(compiled)[:200]}")
            continue
        poison()
        y, tiles = compiled(case)[0], case[0][2]
        last = int(tiles.count) - 1
        group, row, n = (int(a[last]) for a in (tiles.group, tiles.row, tiles.size))
        weights = from_blocks(blocks[0, group], gemm.activate).astype(jnp.float32)
        expected = xs[0][row : row + n].astype(jnp.float32) @ weights
        expected = swiglu(expected) if gemm.activate else expected
        error = jnp.linalg.norm(y[row : row + n].astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        if not float(error) < 3e-3:
            print(f"  {config}: wrong, relative error {float(error):.1e}")
            continue
        found.append((seconds(compiled, case), config))
        print(f"  {found[-1][0] * 1e6:8.1f} us  {config}", flush=True)
    return sorted(found, key=lambda f: f[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of shapes whose name has this in it")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 512, 2048, 16384, 65536])
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    args = parser.parse_args()
    entries = {json.dumps(e["shape"]): e for e in json.loads(tuning.TABLE.read_text())["entries"]}
    for gemm in GEMMS:
        if args.only not in gemm.name:
            continue
        blocks = jax.jit(partial(to_blocks, swiglu=gemm.activate))(
            normal(1, 1, gemm.groups, gemm.k, gemm.columns, scale=0.02)
        )
        for rows in args.rows:
            print(f"{gemm.name}, {rows} rows", flush=True)
            found = tune(gemm, blocks, rows)
            if not found:
                continue
            shape = tuning.Shape(gemm.groups, gemm.k, gemm.columns, max(1, rows // gemm.groups), gemm.activate)
            new = tuning.entry(shape, found[0][1], found[0][0] * 1e6)
            entries[json.dumps(new["shape"])] = new
            device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
            lines = ",\n".join(f"  {json.dumps(e)}" for e in entries.values())
            args.out.write_text(f'{{\n "device": {json.dumps(device)},\n "entries": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
