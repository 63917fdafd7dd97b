"""Grouped GEMMs of MoE models on this GPU: ours against those of torch, tokamax and JAX, in one table.

    python scripts/bench_grouped_gemm.py [--only Qwen3] [--rows 1 8 64 512 …] [--kinds uniform zipf] [--peers …]

bfloat16, random data, another routing in each of a program's calls. Time is wall time of a call among many without a
pause (torch: of a CUDA graph's). Ours includes SwiGLU in the up GEMMs, peers only multiply. TFLOP/s count useful rows,
"padded" what is multiplied in fact; TB/s count x, y and the hit groups' weights once. "of the ceiling" is the greater
of padded TFLOP/s over cuBLAS's and of TB/s over a copy's, both measured first. Errors are relative, against float32,
of memory poisoned with NaN. Peers that are not installed are left out, and named.
"""

import argparse
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

ROWS = [1, 8, 64, 512, 2048, 16384, 65536]
PEERS = ("torch", "tokamax", "ragged_dot_mgpu", "ragged_dot")
MGPU = [(64, 128, 64, 4, 4), (128, 256, 64, 4, 8)]  # block m, n, k, stages, panel
DENSE_FLOPS = 2e13  # `lax.ragged_dot` computes every group for every row: left out above so many


@dataclass(frozen=True)
class Line:
    case: str
    rows: int
    kind: str
    name: str
    seconds: float
    flops: float
    padded: float
    bytes: float
    error: float = float("nan")


def calls_of(rows: int) -> int:
    """Calls in a program: many of what is short."""
    return 2 if rows > 8192 else 4


def torch_times(cases: list[dict[str, Any]]) -> None:
    """In a process of its own, because two frameworks do not share a card's memory well. Prints a line of JSON each."""
    import torch

    for case in cases:
        groups, k, n, rows = case["groups"], case["k"], case["columns"], case["rows"]
        w = torch.randn(groups, n, k, device="cuda", dtype=torch.bfloat16).mul_(0.02).transpose(1, 2)
        for sizes in case["sizes"]:
            x = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _ in sizes["calls"]]
            offsets = [torch.tensor(np.cumsum(s), device="cuda", dtype=torch.int32) for s in sizes["calls"]]

            def run(x: list[Any] = x, offsets: list[Any] = offsets, w: Any = w) -> None:
                for a, o in zip(x, offsets, strict=True):
                    torch._grouped_mm(a, w, offs=o, out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]

            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            times = []
            for n_runs in (2, 0, 0, 0):
                begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
                n_runs = n_runs or max(2, round(20 / max(times[0], 1e-3)))
                begin.record()
                for _ in range(n_runs):
                    graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) / n_runs)
            found = float(np.median(times[1:])) / len(x) * 1e-3
            print(json.dumps([case["name"], rows, sizes["kind"], found]), flush=True)


def peers(names: list[str]) -> dict[str, Callable[..., Any]]:
    """JAX peers that can be had: (x [M, K], w [G, K, N], group sizes [G]) -> [M, N]."""
    import jax
    import jax.numpy as jnp

    found: dict[str, Callable[..., Any]] = {}
    if "ragged_dot" in names:
        found["lax.ragged_dot"] = partial(jax.lax.ragged_dot, preferred_element_type=jnp.bfloat16)
    if "ragged_dot_mgpu" in names:
        module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
        for m, n, k, stages, panel in MGPU:
            options = dict(block_m=m, block_n=n, block_k=k, max_concurrent_steps=stages, grid_block_n=panel)

            def mgpu(x: Any, w: Any, sizes: Any, options: dict[str, int] = options) -> Any:
                return module.ragged_dot(x, w, group_sizes=sizes, **options)

            found[f"ragged_dot_mgpu {m}x{n}x{k}"] = mgpu
    if "tokamax" in names:
        try:
            tokamax = importlib.import_module("tokamax")
            found["tokamax mosaic"] = partial(
                tokamax.ragged_dot, preferred_element_type=jnp.bfloat16, implementation="mosaic"
            )
        except ImportError as e:
            print(f"left out: tokamax ({e})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kinds", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--json", help="also write lines of JSON to this file")
    parser.add_argument("--torch-cases", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_cases:
        torch_times(json.loads(sys.stdin.read()))
        return
    warnings.simplefilter("ignore")

    from _gpu import GEMMS, draw_sizes

    rng = np.random.default_rng(0)
    drawn = {
        (g.name, rows, kind): [draw_sizes(rng, rows, g.groups, kind) for _ in range(calls_of(rows))]
        for g in GEMMS
        if args.only in g.name
        for rows in args.rows
        for kind in args.kinds
    }
    torch_found: dict[tuple[str, int, str], float] = {}
    if "torch" in args.peers:
        cases = [
            {**vars(g), "rows": rows}
            | {"sizes": [{"kind": k, "calls": [s.tolist() for s in drawn[g.name, rows, k]]} for k in args.kinds]}
            for g in GEMMS
            if args.only in g.name
            for rows in args.rows
        ]
        child = subprocess.run(
            [sys.executable, __file__, "--torch-cases", "-"], input=json.dumps(cases), capture_output=True, text=True
        )
        for text in child.stdout.splitlines():
            name, rows, kind, t = json.loads(text)
            torch_found[name, rows, kind] = t
        if child.returncode:
            print("torch:", child.stderr[-300:])
    measure(args, drawn, torch_found)


def measure(
    args: argparse.Namespace,
    drawn: dict[tuple[str, int, str], list[np.ndarray]],
    torch_found: dict[tuple[str, int, str], float],
) -> None:
    import jax
    import jax.numpy as jnp
    from _gpu import GEMMS, ceilings, compile_all, normal, poison, program, seconds, tiles_of

    from moe_jax.kernels import tuning
    from moe_jax.kernels.grouped_gemm import from_blocks, grouped_gemm, swiglu, to_blocks
    from moe_jax.kernels.routing import padded_rows

    flops, bandwidth = ceilings()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: cuBLAS {flops / 1e12:.0f} TFLOP/s, ", end="")
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    log = open(args.json, "w") if args.json else None  # noqa: SIM115

    def show(line: Line) -> None:
        ceiling = max(line.padded / line.seconds / flops, line.bytes / line.seconds / bandwidth)
        print(
            f"{line.case:17s} {line.rows:6d} {line.kind:8s} {line.name:28s} {line.seconds * 1e6:9.1f} us "
            f"{line.flops / line.seconds / 1e12:6.0f} TFLOP/s, padded {line.padded / line.seconds / 1e12:4.0f} "
            f"{line.bytes / line.seconds / 1e12:5.2f} TB/s {ceiling:5.0%} of the ceiling"
            + (f", error {line.error:.1e}" if line.error == line.error else ""),
            flush=True,
        )
        if log:
            print(json.dumps(vars(line) | {"ceiling": ceiling}), file=log, flush=True)

    for g in (g for g in GEMMS if args.only in g.name):
        plain = normal(1, 1, g.groups, g.k, g.columns, scale=0.02)
        blocks, plain = jax.jit(partial(to_blocks, swiglu=g.activate))(plain), plain[0]
        width = g.columns // (2 if g.activate else 1)
        jobs: list[tuple[Any, ...]] = []
        for rows in args.rows:
            config = tuning.best(tuning.Shape(g.groups, g.k, g.columns, max(1, rows // g.groups), g.activate))
            xs = [normal(i, padded_rows(rows, g.groups), g.k) for i in range(calls_of(rows))]
            bare = [x[:rows] for x in xs]
            ready, drawings = [], []
            for kind in args.kinds:
                sizes = drawn[g.name, rows, kind]
                ready.append([(x, blocks, tiles_of(s, config.block_m), jnp.int32(0)) for x, s in zip(xs, sizes)])  # noqa: B905
                drawings.append([(x, plain, jnp.asarray(s, jnp.int32)) for x, s in zip(bare, sizes)])  # noqa: B905
            jobs.append((rows, "ours", partial(grouped_gemm, config=config, activate=g.activate), ready, config))
            for name, f in peers(args.peers).items():
                if name != "lax.ragged_dot" or 2 * rows * g.k * g.columns * g.groups < DENSE_FLOPS:
                    jobs.append((rows, name, f, drawings, None))
        programs = compile_all([partial(program, f, a[0]) for _, _, f, a, _ in jobs])
        for (rows, name, _, drawings, config), compiled in zip(jobs, programs, strict=True):
            for kind, arguments in zip(args.kinds, drawings, strict=True):
                sizes = drawn[g.name, rows, kind]
                fl = 2.0 * rows * g.k * g.columns
                padded, out = fl, g.columns
                if config is not None:
                    out = width
                    tiles = [np.asarray(a[2].size)[: int(a[2].count)] for a in arguments]
                    rounded = [sum(next(w for w in config.widths if w >= s) for s in t) for t in tiles]
                    padded = 2.0 * float(np.mean(rounded)) * g.k * g.columns
                hit = float(np.mean([(s > 0).sum() for s in sizes]))
                moved = 2.0 * (rows * (g.k + out) + hit * g.k * g.columns)
                if isinstance(compiled, Exception):
                    print(
                        f"{g.name:17s} {rows:6d} {kind:8s} {name:28s} {type(compiled).__name__}: {str(compiled)[:90]}"
                    )
                    continue
                error = float("nan")
                if config is not None:
                    poison()
                    y, (x, _, tiles0, _) = compiled(list(arguments))[0], arguments[0]
                    last = int(tiles0.count) - 1
                    errors = []
                    for i in {0, last // 2, last}:
                        group, row, n = (int(a[i]) for a in (tiles0.group, tiles0.row, tiles0.size))
                        w = from_blocks(blocks[0, group], g.activate).astype(jnp.float32)
                        expected = jnp.dot(x[row : row + n].astype(jnp.float32), w, precision="highest")
                        expected = swiglu(expected) if g.activate else expected
                        apart = jnp.linalg.norm(y[row : row + n].astype(jnp.float32) - expected)
                        errors.append(float(apart / jnp.linalg.norm(expected)))
                    error = max(errors) if all(e == e for e in errors) else float("inf")
                show(Line(g.name, rows, kind, name, seconds(compiled, arguments), fl, padded, moved, error))
        for (name, rows, kind), t in torch_found.items():
            if name == g.name:
                hit = float(np.mean([(s > 0).sum() for s in drawn[name, rows, kind]]))
                moved = 2.0 * (rows * (g.k + g.columns) + hit * g.k * g.columns)
                fl = 2.0 * rows * g.k * g.columns
                show(Line(name, rows, kind, "torch._grouped_mm", t, fl, fl, moved))


if __name__ == "__main__":
    main()
