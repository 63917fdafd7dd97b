"""What being elastic costs while nobody is dead: the step of a cluster's engines, against the same engines alone.

    python scripts/bench_steady.py [--hosts 4 --pairs 5] [--json]
    python scripts/bench_steady.py --shape qwen3-30b-a3b --layers 16 --requests 128 --hosts 1

Both have the same slots and serve the same requests. Elastic: `LLM(hosts=N)`, with replicas, supervisors, a
coordinator, heartbeats, and meshes made ready; its tokens come to this process, which takes processor time like the
rest of them: --cores gives every engine cores of its own. Static: N processes that join the JAX service and step, and
nothing else; every expert is there once. The two take turns. A step's time is the median gap between two tokens of a
request while all of them decode, seen here or, static, in the engine. XLA's cost analysis of the two decode programs
for a CPU is printed beside it.

--hosts 1 shows the redundancy alone, on one device: two engines in this process, one with twice as many slots as there
are experts, the other with just as many, take turns at decoding the same requests.

--shape takes one of bench_serving.py's models with random weights. Ranks may share a GPU (MOE_JAX_SHARE_GPU=1).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _cluster import machine
from _shapes import add_model_options, write_model
from rich.console import Console
from rich.table import Table

TOKENS = 256


def prompt(i: int) -> list[int]:
    return [100 + i, 200, 300 + i, 400]


def median_gap(times: list[float]) -> float:
    """Milliseconds between two steps, of the middle half: while all requests decode."""
    middle = times[len(times) // 4 : 3 * len(times) // 4]
    return 1e3 * statistics.median(b - a for a, b in zip(middle, middle[1:], strict=False))


# Static: one process a rank


def static_rank(rank: int, order: dict[str, Any]) -> None:
    import jax
    import numpy as np

    from moe_jax import placement
    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.config import EngineConfig
    from moe_jax.distributed import Meetings, connect
    from moe_jax.engine import Engine
    from moe_jax.executables import Executables
    from moe_jax.local import device_kind
    from moe_jax.mesh import ExpertMesh
    from moe_jax.programs import ProgramStore
    from moe_jax.request import Request, SamplingParams
    from serving.engine_process import yield_seldom

    yield_seldom()
    checkpoint = open_checkpoint(order["model"], order["load_format"])
    engine_config = EngineConfig(**order["config"])
    ranks, model = engine_config.ranks, checkpoint.config
    client = connect(order["address"], rank, ranks)
    device = jax.local_devices()[0]
    hosts, count = [f"host{i}" for i in range(ranks)], engine_config.slots_for(model.num_experts)
    slots = placement.plan(model.num_moe_layers, model.num_experts, hosts, count, 1)
    programs = Executables.of(checkpoint, engine_config, device_kind(device), ProgramStore(Path(order["cache"])))
    engine = Engine(checkpoint, engine_config, [device], slots[:, rank : rank + 1], programs)
    mesh = ExpertMesh(tuple(sorted(jax.devices(), key=lambda d: d.process_index)))
    Meetings(client).live_nodes("epoch-1", range(ranks), 120)
    engine.enter(1, mesh, np.asarray(slots))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, seed=0)
    for i in range(rank, order["requests"], ranks):
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


def run_static(order: dict[str, Any], cores: list[set[int]]) -> float:
    """The slowest rank's step, in milliseconds; ranks step together. cores: that each may use."""
    from serving.environment import engine_environment, guess_platform, sharing_cores
    from serving.jax_service import reserve_port

    ranks, platform = order["config"]["ranks"], guess_platform(os.environ.get("JAX_PLATFORMS"))

    def environ(rank: int) -> dict[str, str]:
        return sharing_cores(ranks, platform, engine_environment(rank, platform, os.environ))

    reserved, port = reserve_port("127.0.0.1")
    order = order | {"address": f"127.0.0.1:{port}"}
    code = _SERVICE.format(address=order["address"], ranks=ranks)
    service = subprocess.Popen([sys.executable, "-c", code], env=environ(0) | {"JAX_PLATFORMS": "cpu"})
    arguments = [sys.executable, __file__, "--static", json.dumps(order)]
    workers = [
        subprocess.Popen([*arguments, str(rank)], stdout=subprocess.PIPE, env=environ(rank), text=True)
        for rank in range(ranks)
    ]
    for worker, its in zip(workers, cores, strict=True):
        os.sched_setaffinity(worker.pid, its)
    try:
        return max(json.loads(worker.communicate(timeout=300)[0].splitlines()[-1])["ms"] for worker in workers)
    finally:
        for process in (*workers, service):
            process.kill()
            process.wait()
        reserved.close()


# Elastic


def run_elastic(llm: Any, requests: int) -> float:
    """The slowest rank's step, in milliseconds, as its tokens' times say."""
    from moe_jax import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    times: dict[str, list[float]] = {llm.submit(prompt(i), params): [] for i in range(requests)}
    while updates := llm.poll():
        now = time.perf_counter()
        for update in updates:
            times[update.request_id] += [now] * bool(update.token_ids)
    return max(median_gap(t) for t in times.values())


def engine_threads() -> Iterator[tuple[int, int]]:
    """Of this process's engines: (rank, thread)."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            _, *command = (path / "cmdline").read_bytes().split(b"\0")
            # Those of supervisors name the module, too, but not after -m.
            if command[1:3] == [b"-m", b"serving.engine_process"] and os.getpid() in ancestors(int(path.name)):
                yield from ((int(command[3]), int(task.name)) for task in (path / "task").iterdir())


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


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


def pair(run: dict[str, Any], i: int) -> dict[str, float]:
    """Both, the other one first every second time."""
    return {name: run[name]() for name in (run if i % 2 == 0 else reversed(run))}


def compare_clusters(args: argparse.Namespace, model: str, options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from moe_jax import LLM
    from moe_jax.llm import model_directory
    from serving.environment import compilation_cache, guess_platform

    platform = guess_platform(os.environ.get("JAX_PLATFORMS"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both are there at the same time
    cores = sorted(os.sched_getaffinity(0))
    engines, each = [set(cores)] * args.hosts, (args.cores or 0) // args.hosts
    if args.cores:
        engines = [set(cores[i * each : (i + 1) * each]) for i in range(args.hosts)]
        os.environ["PJRT_NPROC"] = str(each)
        os.sched_setaffinity(0, cores[args.cores :])  # and so do the coordinator and the supervisors
    with LLM(model, hosts=args.hosts, **options) as llm:
        config = asdict(llm.engine_config)
        order = {
            "model": str(model_directory(model)),
            "load_format": options["load_format"],
            "config": config,
            "cache": str(compilation_cache(platform, None, os.environ)),
            "requests": args.requests,
        }
        for rank, thread in engine_threads() if args.cores else ():
            os.sched_setaffinity(thread, engines[rank])
        run_elastic(llm, args.requests)  # warm
        time.sleep(5.0)  # until the meshes that a loss would leave are ready
        # The other side waits idle: parked engines take no processor time.
        run = {"elastic": lambda: run_elastic(llm, args.requests), "static": lambda: run_static(order, engines)}
        pairs = measure(run, args.pairs)
    if platform != "cpu" or args.shape != "demo":
        return {"pairs": pairs, "cost": {}}
    return {"pairs": pairs, "cost": dict(zip(run, costs(config, (config["replication"], 1)), strict=True))}


def compare_slots(args: argparse.Namespace, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two engines on one device: milliseconds of a step of each, the median of three runs."""
    from bench_serving import SETTLE, Server

    from moe_jax.config import ModelConfig
    from moe_jax.llm import model_directory
    from serving.environment import compilation_cache, guess_platform

    path, load_format = model_directory(model), options.pop("load_format")
    experts, steps = ModelConfig.from_json(path).num_experts, 3 * args.steps * args.pairs
    context = args.context or 16
    options["max_prefill_rows"] = rows = 512  # prefill is not measured, and more of it takes longer to compile
    waiting = -(-args.requests * context // rows)  # steps in which the first already decode, until all do
    longest = context + waiting + steps + 2 * SETTLE
    options["max_model_len"] = max(options.get("max_model_len") or 0, longest)
    options["num_pages"] = args.requests * -(-options["max_model_len"] // 64)
    cache = compilation_cache(guess_platform(os.environ.get("JAX_PLATFORMS")), None, os.environ)
    twice, once = (Server(path, options | {"slots": n * experts}, cache, load_format) for n in (2, 1))
    with (
        twice.decoding(args.requests, context, steps),
        once.decoding(args.requests, context, steps),
    ):
        run = {name: lambda s=s: 1e3 * s.decode(args.steps) for name, s in (("redundant", twice), ("plain", once))}
        return {"pairs": measure(run, args.pairs), "cost": {}}


def measure(run: dict[str, Any], pairs: int) -> list[dict[str, float]]:
    found = []
    for i in range(pairs):
        found.append(pair(run, i))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> int:
    if sys.argv[1:2] == ["--static"]:
        static_rank(int(sys.argv[3]), json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description="What being elastic costs while nobody is dead.", allow_abbrev=False)
    add_model_options(parser)
    parser.add_argument("--hosts", type=int, default=4, help="1: what spare slots cost on one device")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="decoded at once")
    parser.add_argument(
        "--cores", type=int, help="of a CPU: so many shared out among the engines, the rest for all others"
    )
    parser.add_argument("--context", type=int, help="with --hosts 1: tokens of each prompt (default: 16)")
    parser.add_argument("--steps", type=int, default=32, help="with --hosts 1: of each of a turn's three runs")
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()
    if args.cores is not None and not args.hosts <= args.cores < (most := len(os.sched_getaffinity(0))):
        parser.error(f"--cores: found {args.cores}, expected {args.hosts} to {most - 1}: one a host, and one left")
    if args.cores is not None and args.cores % args.hosts:
        parser.error(f"--cores: found {args.cores}, expected a multiple of {args.hosts} hosts: all have as many")
    options: dict[str, Any] = {"load_format": "auto", "max_batch": -(-args.requests // 16) * 16}
    with tempfile.TemporaryDirectory() as directory:
        model = "demo"
        if args.shape != "demo":
            model = str(write_model(args.shape, args.layers, Path(directory)))
            options |= {"load_format": "dummy", "max_model_len": 512}
        found = (compare_slots if args.hosts == 1 else compare_clusters)(args, model, options)
    pairs, cost = found["pairs"], found["cost"]
    first, second = pairs[0]
    ratios = [p[first] / p[second] for p in pairs]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
        "shape": args.shape,
        "layers": args.layers,
        "hosts": args.hosts,
        "requests": args.requests,
        "pairs": [{k: round(v, 3) for k, v in p.items()} for p in pairs],
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 4) for r in ratios],
        "cost": cost,
    }
    title = f"{args.shape}, {args.hosts} hosts, {args.requests} requests decoding"
    table = Table("", f"{first}, ms a step", second, "ratio", title=title)
    for i, (p, r) in enumerate(zip(pairs, ratios, strict=True), 1):
        table.add_row(f"pair {i}", f"{p[first]:.3f}", f"{p[second]:.3f}", f"{r:.4f}")
    table.add_row("median", "", "", f"{result['ratio']:.4f}")
    for name in ("flops", "bytes") if cost else ():
        table.add_row(name, *(f"{cost[side][name]:.6g}" for side in (first, second)), "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{result['cpu']}, {result['cores']} cores; {result['date']}; jax {result['jax']}", soft_wrap=True)
    console.print(table)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
