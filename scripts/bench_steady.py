"""What being elastic costs while nobody is dead: the step of a cluster's engines, against the same engines alone.

    python scripts/bench_steady.py [--hosts 4 --pairs 5] [--json]

Both have the same slots and serve the same 32 requests. Elastic: `LLM(hosts=N)`, with replicas, supervisors, a
coordinator, heartbeats, and meshes made ready; its tokens come to this process. Static: N processes that join the JAX
service and step, and nothing else; every expert is there once. The two take turns. A step's time is the median gap
between two tokens of a request while all of them decode, seen here or, static, in the engine.

XLA's cost analysis of the two decode programs is printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _cluster import machine
from rich.console import Console
from rich.table import Table

TOKENS = 256
REQUESTS = 32


def prompt(i: int) -> list[int]:
    return [100 + i, 200, 300 + i, 400]


def median_gap(times: list[float]) -> float:
    """Milliseconds between two steps, of the middle half: while all requests decode."""
    middle = times[len(times) // 4 : 3 * len(times) // 4]
    return 1e3 * statistics.median(b - a for a, b in zip(middle, middle[1:], strict=False))


# Static: one process a rank


def static_rank(rank: int, address: str, config: dict[str, Any], cache: str) -> None:
    import jax
    import numpy as np

    from moe_jax import placement
    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.config import EngineConfig
    from moe_jax.distributed import Meetings, connect
    from moe_jax.engine import Engine
    from moe_jax.executables import Executables
    from moe_jax.llm import model_directory
    from moe_jax.mesh import ExpertMesh
    from moe_jax.programs import ProgramStore
    from moe_jax.request import Request, SamplingParams

    checkpoint, engine_config = open_checkpoint(model_directory("demo")), EngineConfig(**config)
    ranks, model = engine_config.ranks, checkpoint.config
    client = connect(address, rank, ranks)
    device = jax.local_devices()[0]
    hosts, count = [f"host{i}" for i in range(ranks)], engine_config.slots_for(model.num_experts)
    slots = placement.plan(model.num_moe_layers, model.num_experts, hosts, count, 1)
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    programs = Executables.of(checkpoint, engine_config, kind, ProgramStore(Path(cache)))
    engine = Engine(checkpoint, engine_config, [device], slots[:, rank : rank + 1], programs)
    mesh = ExpertMesh(tuple(sorted(jax.devices(), key=lambda d: d.process_index)))
    Meetings(client).live_nodes("epoch-1", range(ranks), 120)
    engine.enter(1, mesh, np.asarray(slots))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, seed=0)
    for i in range(rank, REQUESTS, ranks):
        engine.add(0, Request(f"r{i}", prompt(i), params))
    engine.bells_heard = 1
    times: list[float] = []
    while engine.has_work:
        engine.step()
        times.append(time.perf_counter())
    print(json.dumps({"ms": median_gap(times)}), flush=True)
    os._exit(0)  # not by way of destructors, which wait for peers


_SERVICE = """
import time
from moe_jax.distributed import start_service
service = start_service({address!r}, {ranks})
time.sleep(600)
"""


def run_static(config: dict[str, Any], cache: str) -> float:
    """The slowest rank's step, in milliseconds; ranks step together."""
    from serving.environment import engine_environment
    from serving.jax_service import reserve_port

    def environ(rank: int) -> dict[str, str]:
        return engine_environment(rank, "cpu", os.environ)

    ranks = config["ranks"]
    reserved, port = reserve_port("127.0.0.1")
    address = f"127.0.0.1:{port}"
    service = subprocess.Popen([sys.executable, "-c", _SERVICE.format(address=address, ranks=ranks)], env=environ(0))
    arguments = [sys.executable, __file__, "--static", address, json.dumps(config), cache]
    workers = [
        subprocess.Popen([*arguments, str(rank)], stdout=subprocess.PIPE, env=environ(rank), text=True)
        for rank in range(ranks)
    ]
    try:
        return max(json.loads(worker.communicate(timeout=300)[0].splitlines()[-1])["ms"] for worker in workers)
    finally:
        for process in (*workers, service):
            process.kill()
            process.wait()
        reserved.close()


# Elastic


def run_elastic(llm: Any) -> float:
    """The slowest rank's step, in milliseconds, as its tokens' times say."""
    from moe_jax import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    times: dict[str, list[float]] = {llm.submit(prompt(i), params): [] for i in range(REQUESTS)}
    while updates := llm.poll():
        now = time.perf_counter()
        for update in updates:
            times[update.request_id] += [now] * bool(update.token_ids)
    return max(median_gap(t) for t in times.values())


def costs(config: dict[str, Any], replications: tuple[int, ...]) -> list[dict[str, float]]:
    """FLOPs and bytes of a decode step, by XLA's count."""
    code = f"""
import json
from dataclasses import replace
from moe_jax.distributed import set_cpu_devices
from moe_jax.config import EngineConfig
config = EngineConfig(**json.loads({json.dumps(config)!r}))
set_cpu_devices(config.ranks)
import jax
from moe_jax.checkpoint import open_checkpoint
from moe_jax.executables import Executables, Program
from moe_jax.llm import model_directory
from moe_jax.mesh import ExpertMesh
from moe_jax.programs import ProgramStore
for replication in {replications}:
    e = Executables.of(open_checkpoint(model_directory("demo")), replace(config, replication=replication), "cpu",
                       ProgramStore(None))
    mesh, bucket = ExpertMesh(tuple(jax.devices())), e.engine.buckets[0]
    cost = e.step(bucket, mesh).lower(*e.arguments(Program("step", bucket, mesh.size), mesh)).compile().cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    print(json.dumps({{"flops": cost["flops"], "bytes": cost["bytes accessed"]}}))
"""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in out.stdout.splitlines()]


def main() -> int:
    if sys.argv[1:2] == ["--static"]:
        address, config, cache, rank = sys.argv[2:]
        static_rank(int(rank), address, json.loads(config), cache)
    parser = argparse.ArgumentParser(description="What being elastic costs while nobody is dead.", allow_abbrev=False)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()
    from dataclasses import asdict

    from moe_jax import LLM
    from serving.environment import compilation_cache

    cache = str(compilation_cache("cpu", None, os.environ))
    pairs: list[dict[str, float]] = []
    with LLM("demo", hosts=args.hosts, max_batch=32) as llm:
        config = asdict(llm.engine_config)
        run_elastic(llm)  # warm
        time.sleep(5.0)  # until the meshes that a loss would leave are ready
        for i in range(args.pairs):
            # The other side waits idle: parked engines take no processor time.
            both = {"elastic": run_elastic, "static": lambda _: run_static(config, cache)}
            order = ["elastic", "static"] if i % 2 == 0 else ["static", "elastic"]
            pairs.append({name: both[name](llm) for name in order})
            print(pairs[-1], file=sys.stderr, flush=True)
    ratios = [p["elastic"] / p["static"] for p in pairs]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
        "hosts": args.hosts,
        "pairs": [{k: round(v, 3) for k, v in p.items()} for p in pairs],
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
        "cost": dict(zip(("elastic", "static"), costs(config, (config["replication"], 1)), strict=True)),
    }
    title = f"{args.hosts} hosts, {REQUESTS} requests decoding"
    table = Table("", "elastic, ms a step", "static", "ratio", title=title)
    for i, (p, r) in enumerate(zip(pairs, ratios, strict=True), 1):
        table.add_row(f"pair {i}", f"{p['elastic']:.3f}", f"{p['static']:.3f}", f"{r:.4f}")
    table.add_row("median", "", "", f"{result['ratio']:.4f}")
    for name in ("flops", "bytes"):
        table.add_row(name, *(f"{result['cost'][side][name]:.6g}" for side in ("elastic", "static")), "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{result['cpu']}, {result['cores']} cores; {result['date']}; jax {result['jax']}", soft_wrap=True)
    console.print(table)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
