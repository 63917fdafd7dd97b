"""How tokens reach the ranks that hold their experts: all-gather and reduce-scatter against all-to-all.

    python scripts/bench_dispatch.py [--devices 4 --tokens 64 1024 16384] [--json]

One process with all of this machine's devices (on a CPU as many as --devices says). Timed is the way there and back,
`moe_jax.moe.Dispatch` as the engine has it, beside an all-to-all that sends a token once to each rank which holds some
of its experts and nowhere else. Its buffers are fixed: as large as the drawn routing needs, so that nothing is dropped,
which no server could know beforehand. Experts are a factor each, so that their time hides nothing; both ways must give
the same rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu import program, seconds
from jax import lax
from jax.sharding import NamedSharding

from moe_jax.mesh import SHARDED, ExpertMesh
from moe_jax.moe import AXIS, Dispatch

CALLS = 8  # in a program, so that the host's time hides behind the devices'
ALIKE = {"bfloat16": 2e-2, "float32": 1e-5}  # relative: the largest difference over the largest value


def draw_routing(rng: np.random.Generator, rows: int, experts: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32 [rows, top_k]: different experts of each row, all equally likely, and weights that sum to 1."""
    ids = rng.random((rows, experts)).argpartition(top_k - 1, axis=1)[:, :top_k].astype(np.int32)
    weights = rng.random((rows, top_k), np.float32)
    return ids, weights / weights.sum(1, keepdims=True)


def capacity_for(ids: np.ndarray, ranks: int, experts: int) -> int:
    """The most tokens that a rank has for another, or itself: rows of a fixed buffer that drops none. ids [ranks * T,
    top_k]; expert e is on rank e // (experts / ranks)."""
    owner = (ids // (experts // ranks)).reshape(ranks, -1, ids.shape[1])
    return int(max((owner == rank).any(-1).sum(-1).max() for rank in range(ranks)))


def serve(x: jax.Array, ids: jax.Array, weights: jax.Array, factors: jax.Array, first: jax.Array) -> jax.Array:
    """What this rank's experts, from number `first` on, add to rows [M, H], in x's dtype; ids -1: nothing."""
    mine = (ids >= first) & (ids < first + factors.shape[0])
    each = jnp.where(mine, weights * factors[jnp.clip(ids - first, 0, factors.shape[0] - 1)], 0)
    return (x * each.sum(1, keepdims=True)).astype(x.dtype)


def by_gathering(x: jax.Array, ids: jax.Array, weights: jax.Array, factors: jax.Array, ranks: int) -> jax.Array:
    """[T, H] of this rank -> the sum of each row's experts, [T, H]. factors: of this rank's experts."""
    dispatch = Dispatch(ranks)
    everyone, all_ids, all_weights = dispatch.gather(x, ids, weights)
    return dispatch.reduce(serve(everyone, all_ids, all_weights, factors, lax.axis_index(AXIS) * factors.shape[0]))


def by_all_to_all(
    x: jax.Array, ids: jax.Array, weights: jax.Array, factors: jax.Array, ranks: int, capacity: int
) -> jax.Array:
    """As `by_gathering`. A token that finds its buffer full would be dropped: see `capacity_for`."""
    each = factors.shape[0]
    wanted = (ids[None] // each == jnp.arange(ranks)[:, None, None]).any(-1)  # [ranks, T]
    place = jnp.where(wanted, jnp.cumsum(wanted, axis=1) - 1, capacity)  # out of bounds: dropped
    to = jnp.arange(ranks)[:, None]

    def send(rows: jax.Array, fill: int) -> jax.Array:
        """[T, ...] -> [ranks * capacity, ...]: what all ranks have for this one."""
        empty = jnp.full((ranks, capacity, *rows.shape[1:]), fill, rows.dtype)
        full = empty.at[to, place].set(jnp.broadcast_to(rows, (ranks, *rows.shape)), mode="drop")
        return lax.all_to_all(full, AXIS, 0, 0).reshape(ranks * capacity, *rows.shape[1:])

    y = serve(send(x, 0), send(ids, -1), send(weights, 0), factors, lax.axis_index(AXIS) * each)
    back = lax.all_to_all(y.reshape(ranks, capacity, -1), AXIS, 0, 0)
    rows = back.at[to, place].get(mode="fill", fill_value=0)  # [ranks, T, H]
    return rows.astype(jnp.float32).sum(0).astype(x.dtype)


def measure(mesh: ExpertMesh, tokens: int, hidden: int, experts: int, top_k: int, dtype: str) -> dict[str, Any]:
    """Microseconds there and back of both ways, and the bytes that a rank sends to others."""
    ranks, rng = mesh.size, np.random.default_rng(tokens)
    ids, weights = draw_routing(rng, ranks * tokens, experts, top_k)
    capacity = capacity_for(ids, ranks, experts)
    put = partial(jax.device_put, device=NamedSharding(mesh.mesh, SHARDED))
    factors = put(rng.uniform(0.5, 2, experts).astype(np.float32))
    drawn = [put(rng.standard_normal((ranks * tokens, hidden), np.float32).astype(jnp.dtype(dtype))) for _ in range(2)]
    arguments = [(drawn[i % 2], put(ids), put(weights), factors) for i in range(CALLS)]
    ways: dict[str, Callable[..., jax.Array]] = {
        "gather": partial(by_gathering, ranks=ranks),
        "all_to_all": partial(by_all_to_all, ranks=ranks, capacity=capacity),
    }
    row: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "experts": experts, "capacity": capacity}
    rows: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        f = jax.shard_map(way, mesh=mesh.mesh, in_specs=(SHARDED,) * 4, out_specs=SHARDED, check_vma=False)
        compiled = program(f, arguments)
        rows[name] = np.asarray(compiled(arguments)[0]).astype(np.float32)
        row[f"{name}_us"] = round(1e6 * seconds(compiled, arguments), 1)
    apart = float(np.abs(rows["gather"] - rows["all_to_all"]).max() / np.abs(rows["gather"]).max())
    if not apart <= ALIKE[dtype]:
        raise RuntimeError(f"{row}: found results that differ by {apart:.2g}, expected at most {ALIKE[dtype]}")
    size, others = jnp.dtype(dtype).itemsize, ranks - 1
    row |= {"apart": apart, "gather_mb": round(2 * others * tokens * hidden * size / 1e6, 3)}
    row |= {"all_to_all_mb": round(2 * others * capacity * hidden * size / 1e6, 3)}
    return row | {"ratio": round(row["all_to_all_us"] / row["gather_us"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, help="how many (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384], help="of each rank")
    parser.add_argument(
        "--sizes", nargs="+", default=["2048,128", "7168,256"], metavar="HIDDEN,EXPERTS", help="of the models"
    )
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dtype", choices=ALIKE, default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row in place of the table")
    args = parser.parse_args()
    if args.devices and jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", args.devices)
    devices = jax.devices()[: args.devices]
    if len(devices) < max(2, args.devices or 0):
        wanted = args.devices or "at least 2"
        parser.error(f"--devices: found {len(devices)}, expected {wanted}; with JAX_PLATFORMS=cpu there are any number")
    sizes = [tuple(int(n) for n in pair.split(",")) for pair in args.sizes]
    if odd := [experts for _, experts in sizes if experts % len(devices) or experts < args.top_k]:
        parser.error(f"--sizes: found {odd} experts, expected multiples of {len(devices)} from {args.top_k} on")
    device = devices[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    about = {"device": device.device_kind, "devices": len(devices), "memory": memory, "jax": jax.__version__}
    print(json.dumps(about) if args.json else f"{datetime.date.today()}, {about}", flush=True)
    if not args.json:
        print("tokens a rank, hidden, experts: all-gather and reduce-scatter; all-to-all; ratio; MB that a rank sends")
    mesh = ExpertMesh(tuple(devices))
    for hidden, experts in sizes:
        for tokens in args.tokens:
            row = measure(mesh, tokens, hidden, experts, args.top_k, args.dtype)
            line = "{tokens:6d} {hidden:5d} {experts:4d}: {gather_us:9.1f} us {all_to_all_us:9.1f} us  {ratio:6.3f}  "
            line += "{gather_mb:.2f} {all_to_all_mb:.2f}"
            print(json.dumps(row) if args.json else line.format(**row), flush=True)


if __name__ == "__main__":
    main()
