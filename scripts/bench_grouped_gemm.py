"""Grouped GEMMs of MoE models on this GPU: ours against those of torch, tokamax and JAX, in one table.

    python scripts/bench_grouped_gemm.py [--only Qwen3] [--rows 1 8 64 512 …] [--kinds uniform zipf] [--peers …]

bfloat16, random data, another routing in each of a program's calls. Time is wall time of a call among many without a
pause (torch: of a CUDA graph's). Ours includes SwiGLU in the up GEMMs, peers only multiply. TFLOP/s count useful rows,
"padded" what is multiplied in fact; TB/s count x, y and the hit groups' weights once. "of the ceiling" is the greater
of padded TFLOP/s over cuBLAS's and of TB/s over a copy's, both measured first. Errors are relative, against float32,
of memory poisoned with NaN, the worst of all tiles. Peers that are not installed are left out, and named.

Each shape has a process, all of which compile at once; then they measure, one after the other.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

ROWS = [1, 8, 64, 512, 2048, 16384, 65536]
PEERS = ("torch", "tokamax", "ragged_dot_mgpu", "ragged_dot")
DENSE_FLOPS = 2e13  # `lax.ragged_dot` computes every group for every row: left out above so many
MGPU = [(64, 128, 64, 4, 4), (128, 256, 64, 4, 8)]  # block m, n, k, stages, panel


@dataclass(frozen=True)
class Line:
    case: str
    rows: int
    kind: str
    name: str
    seconds: float
    padded: float = 0.0  # rows that are multiplied in fact, 0: those that are useful
    error: float = float("nan")


def calls_of(rows: int) -> int:
    """Calls in a program: many of what is short."""
    return 1 if rows > 32768 else 2 if rows > 8192 else 4 if rows > 512 else 12


def drawn(case: str, rows: int, kind: str, groups: int) -> list[np.ndarray]:
    """Rows of each group in each call; the same in every process."""
    from _gpu import draw_sizes

    rng = np.random.default_rng([*case.encode(), rows, *kind.encode()])
    return [draw_sizes(rng, rows, groups, kind) for _ in range(calls_of(rows))]


def torch_times(kinds: Sequence[str], rows: Sequence[int], only: str) -> None:
    """In a process of its own, because two frameworks do not share a card's memory well. Prints a line of JSON each."""
    import torch
    from _gpu import GEMMS

    begin_when_told()
    for g, n_rows in ((g, n) for g in GEMMS if only in g.name for n in rows):
        w = torch.randn(g.groups, g.columns, g.k, device="cuda", dtype=torch.bfloat16).mul_(0.02).transpose(1, 2)
        for kind in kinds:
            sizes = drawn(g.name, n_rows, kind, g.groups)
            x = [torch.randn(n_rows, g.k, device="cuda", dtype=torch.bfloat16) for _ in sizes]
            offsets = [torch.tensor(np.cumsum(s), device="cuda", dtype=torch.int32) for s in sizes]

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
            print(json.dumps(vars(Line(g.name, n_rows, kind, "torch._grouped_mm", found))), flush=True)


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
            print(f"left out: tokamax ({e})", file=sys.stderr)
    return found


def measure_ceilings() -> None:
    """Prints FLOP/s of cuBLAS, bytes/s of a copy, and what the device is."""
    import jax
    from _gpu import ceilings

    begin_when_told()
    print(json.dumps([*ceilings(), f"{jax.devices()[0].device_kind}, jax {jax.__version__}"]))


def begin_when_told() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("the parent has ended")


def jax_times(args: argparse.Namespace) -> None:
    """Ours and JAX's peers at one shape; prints a line of JSON each."""
    import jax
    import jax.numpy as jnp
    from _gpu import GEMMS, check, compile_all, normal, poison, program, seconds, tiles_of

    from moe_jax.kernels import tuning
    from moe_jax.kernels.grouped_gemm import Config, grouped_gemm, to_blocks
    from moe_jax.kernels.routing import padded_rows

    (g,) = (g for g in GEMMS if g.name == args.child)
    cut = jax.jit(partial(to_blocks, swiglu=g.activate))
    like = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    plain = like((g.groups, g.k, g.columns))
    blocks = jax.eval_shape(cut, like((1, *plain.shape)))
    layer = jnp.int32(0)

    configs: dict[int, Config] = {}
    jobs: list[Callable[[], Any]] = []
    names: list[tuple[int, str]] = []
    theirs = peers(args.peers)
    for rows in args.rows:
        shape = tuning.Shape(g.groups, g.k, g.columns, max(1, rows // g.groups), g.activate)
        configs[rows] = c = tuning.best(shape)
        x, n = like((padded_rows(rows, g.groups), g.k)), calls_of(rows)
        tiles = tiles_of(drawn(g.name, rows, args.kinds[0], g.groups)[0], c.block_m)
        jobs.append(
            partial(program, partial(grouped_gemm, config=c, activate=g.activate), [(x, blocks, tiles, layer)] * n)
        )
        jobs.append(partial(check, x, blocks, tiles, c.block_m, g.activate))
        names += [(rows, "ours"), (rows, "check")]
        for name, f in theirs.items():
            if name == "lax.ragged_dot" and 2.0 * rows * g.k * g.columns * g.groups > DENSE_FLOPS:
                continue
            arguments = like((rows, g.k)), plain, jax.ShapeDtypeStruct((g.groups,), jnp.int32)
            jobs.append(partial(program, f, [arguments] * n))
            names.append((rows, name))
    begun = time.perf_counter()
    built = dict(zip(names, compile_all(jobs, args.threads), strict=True))
    print(f"{g.name}: {len(jobs)} programs in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)

    weights = normal(1, 1, *plain.shape, scale=0.02)
    w_blocks, w_plain = cut(weights), weights[0]
    del weights

    def draw(rows: int, kind: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """The arguments of our calls and of the peers'."""
        xs = [normal(i, padded_rows(rows, g.groups), g.k) for i in range(calls_of(rows))]
        sizes = drawn(g.name, rows, kind, g.groups)
        ours = [(x, w_blocks, tiles_of(s, configs[rows].block_m), layer) for x, s in zip(xs, sizes, strict=True)]
        return ours, [(x[:rows], w_plain, jnp.asarray(s, jnp.int32)) for x, s in zip(xs, sizes, strict=True)]

    for rows in args.rows:  # compiles what draws them
        draw(rows, args.kinds[0])
    begin_when_told()
    for rows in args.rows:
        c = configs[rows]
        for kind in args.kinds:
            ours, peer = draw(rows, kind)
            for name in ("ours", *theirs):
                compiled, padded, error = built.get((rows, name)), 0.0, float("nan")
                if compiled is None:
                    continue
                if isinstance(compiled, Exception):
                    print(f"{g.name} {rows} {name}: {type(compiled).__name__} {str(compiled)[:200]}", file=sys.stderr)
                    continue
                if name == "ours":
                    each = [np.asarray(a[2].size)[: int(a[2].count)] for a in ours]
                    padded = float(np.mean([sum(next(w for w in c.widths if w >= s) for s in t) for t in each]))
                    poison()
                    ys = compiled(ours)
                    error = float(built[rows, "check"](*ours[0][:3], ys[0]))
                    del ys
                try:
                    found = seconds(compiled, ours if name == "ours" else peer)
                except Exception as e:  # noqa: BLE001  a peer that fails is a row less
                    print(f"{g.name} {rows} {name}: {type(e).__name__} {str(e)[:200]}", file=sys.stderr)
                    continue
                print(json.dumps(vars(Line(g.name, rows, kind, name, found, padded, error))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--kinds", nargs="+", default=["uniform", "zipf"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--json", help="also write lines of JSON to this file")
    parser.add_argument("--threads", type=int, default=3, help="that each shape's process compiles with")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child == "ceilings":
        measure_ceilings()
    elif args.child == "torch":
        torch_times(args.kinds, args.rows, args.only)
    elif args.child:
        jax_times(args)
    else:
        table(args)


def table(args: argparse.Namespace) -> None:
    # Processes that share a card take of its memory what they use, and leave some.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.15"
    from _gpu import GEMMS

    gemms = {g.name: g for g in GEMMS if args.only in g.name}
    names = ["ceilings", *(["torch"] if "torch" in args.peers else []), *gemms]
    command = [sys.executable, *sys.argv, "--child"]
    children = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    }
    begun = time.perf_counter()
    for child in children.values():
        assert child.stdout
        child.stdout.readline()
    print(f"compiled in {time.perf_counter() - begun:.0f} s")
    flops = bandwidth = 1.0
    log = open(args.json, "w") if args.json else None  # noqa: SIM115
    failed = False
    for name in names:
        child = children[name]
        assert child.stdin and child.stdout
        child.stdin.write("\n")
        child.stdin.flush()
        for text in child.stdout:
            if name == "ceilings":
                flops, bandwidth, device = json.loads(text)
                print(f"{device}: cuBLAS {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
                continue
            line = Line(**json.loads(text))
            g = gemms[line.case]
            sizes = drawn(line.case, line.rows, line.kind, g.groups)
            columns = g.columns // (2 if g.activate and line.name == "ours" else 1)
            hit = float(np.mean([(s > 0).sum() for s in sizes]))
            moved = 2.0 * (line.rows * (g.k + columns) + hit * g.k * g.columns)
            work = 2.0 * g.k * g.columns
            useful, padded = work * line.rows, work * (line.padded or line.rows)
            ceiling = max(padded / line.seconds / flops, moved / line.seconds / bandwidth)
            print(
                f"{line.case:17s} {line.rows:6d} {line.kind:8s} {line.name:28s} {line.seconds * 1e6:9.1f} us "
                f"{useful / line.seconds / 1e12:6.1f} TFLOP/s, padded {padded / line.seconds / 1e12:6.1f} "
                f"{moved / line.seconds / 1e12:5.2f} TB/s {ceiling:5.0%} of the ceiling"
                + (f", error {line.error:.1e}" if line.error == line.error else ""),
                flush=True,
            )
            if log:
                print(json.dumps(vars(line) | {"bytes": moved, "ceiling": ceiling}), file=log, flush=True)
        failed |= child.wait() != 0
    if failed:
        sys.exit("a process failed; its message stands above")


if __name__ == "__main__":
    main()
