"""Decode throughput, prefill rate and time to first token of the engine, beside the ceilings and `transformers`.

    python scripts/bench_serving.py [--shape qwen3-30b-a3b | deepseek-v3 | demo] [--layers N] [--batch 1 32 128 256]
                                    [--context 1024] [--peer-batch 1 128] [--kernels K …] [--profile] [--float8]

Random weights and random tokens, greedy, one device. The roofline of a decode step is the time that its bytes take at
the speed of a copy measured in the same run: dense weights, the weights of the experts that its tokens hit (counted in
a step), keys and values. Prefill's is the products' FLOPs, attention's included, at the rate of a dense 8192³ product.
`transformers` runs the same shape in a process of its own before, with the better of its experts implementations.
--profile adds where a step's time goes on the device, from a profiler trace. --float8: experts in 8 bits, as
DeepSeek-V3 is published. A model that does not fit the device loses layers, unless --layers asked for them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _shapes import SHAPES, write_shape

SETTLE = 4  # decode steps that are not counted


# transformers


def peer(order: dict[str, Any]) -> None:
    """In a process of its own, because two frameworks do not share a card's memory well. Prints lines of JSON."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    config = AutoConfig.from_pretrained(order["path"])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    def timed(f: Any) -> tuple[float, Any]:
        wait()
        begun = time.perf_counter()
        out = f()
        wait()
        return time.perf_counter() - begun, out

    def tokens(batch: int, length: int) -> Any:
        return torch.randint(0, config.vocab_size, (batch, length), device=device)

    context, steps = order["context"], order["steps"]
    with torch.inference_mode():
        model.set_experts_implementation("grouped_mm")
        rows = min(16, max(order["batch"]))
        model(tokens(rows, context), logits_to_keep=1)
        seconds = min(timed(lambda: model(tokens(rows, context), logits_to_keep=1))[0] for _ in range(2))
        print(json.dumps({"prefill": rows * context / seconds}), flush=True)
        for batch in order["batch"]:
            cache, found = DynamicCache(config=config), {}
            model.set_experts_implementation("grouped_mm")
            for part in range(0, context, 256):  # in parts: the whole would not fit beside the weights
                model(tokens(batch, min(256, context - part)), past_key_values=cache, logits_to_keep=1)
            # batched_mm copies each token's experts: for few tokens only.
            for name in ("grouped_mm", "batched_mm") if batch <= 2 else ("grouped_mm",):
                model.set_experts_implementation(name)
                one = tokens(batch, 1)

                def step(one: Any = one, cache: Any = cache) -> None:
                    model(one, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)

                for _ in range(2):
                    step()
                found[name] = timed(lambda step=step: [step() for _ in range(steps)])[0] / steps
            best = min(found, key=lambda name: found[name])
            print(json.dumps({"batch": batch, "step": found[best], "experts": best}), flush=True)
            del cache
            if device == "cuda":
                torch.cuda.empty_cache()


def run_peer(order: dict[str, Any]) -> list[dict[str, Any]]:
    child = subprocess.run(
        [sys.executable, __file__, "--as-peer"], input=json.dumps(order), capture_output=True, text=True
    )
    if child.returncode:
        print("transformers:", child.stderr[-1000:], file=sys.stderr)
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


# Ours


@dataclass(frozen=True)
class Work:
    """What a step must at least do, by the model's sizes."""

    dense: int  # bytes of the weights that every step reads
    expert: int  # bytes of an expert
    position: int  # bytes of a position's keys and values in all layers
    flops: int  # of a token's products but attention's
    attention: int  # FLOPs of a token for each position that it sees


def work_of(model: Any, engine: Any) -> Work:
    from moe_jax.memory import position_bytes
    from moe_jax.params import iterate

    size = 2 if engine.dtype == "bfloat16" else 4
    dense = expert = flops = 0
    for path, param, _, layers in iterate(model):
        count = int(np.prod(param.shape))
        if param.expert:
            each = 1 if param.float8 else 4 if param.float32 else size  # float32: the scales of 8-bit ones
            expert += count * each if path[1] == model_experts(model) else 0
            flops += 0 if param.float32 else 2 * count * model.top_k * layers
        elif path != ("embed",):
            dense += max(layers, 1) * count * (4 if param.float32 else size)
            flops += 2 * max(layers, 1) * count if len(param.shape) > 1 else 0
    value_dim = model.latent.kv_rank if model.latent else model.head_dim
    key_dim = model.latent.kv_rank + model.latent.rope_dim if model.latent else model.head_dim
    attention = 2 * model.num_layers * model.num_heads * (key_dim + value_dim)
    return Work(dense, expert, position_bytes(model, engine), flops, attention)


def model_experts(model: Any) -> int:
    """The last segment with experts; all have the same."""
    return max(i for i, (has_experts, _, _) in enumerate(model.segments) if has_experts)


class Server:
    """The engine in this process, driven as `LLM` drives it."""

    def __init__(
        self, path: Path, options: dict[str, Any], cache: Path | None = None, load_format: str = "dummy"
    ) -> None:
        """cache: where compiled programs are kept."""
        from moe_jax.local import LocalBackend
        from moe_jax.programs import ProgramStore

        begun = time.perf_counter()
        self.backend = LocalBackend(path, 1, load_format, options, ProgramStore(cache))
        self.start = time.perf_counter() - begun
        self.random, self.count = np.random.default_rng(0), 0

    def submit(self, length: int, max_tokens: int) -> str:
        from moe_jax.request import Request, SamplingParams

        self.count += 1
        tokens = self.random.integers(0, self.backend.model.vocab_size, length).tolist()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0)
        self.backend.submit(Request(str(self.count), tokens, params))
        return str(self.count)

    def drain(self) -> None:
        engine = self.backend.engine
        assert engine is not None
        while engine.has_work:
            self.backend.poll(None)
        while engine.in_flight:
            engine.finish()

    def first_token(self, length: int, repeats: int = 5) -> float:
        """Seconds from a request to its first token, with nothing else to do; the median."""
        times = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            self.submit(length, 1)
            while not self.backend.poll(None):
                pass
            times.append(time.perf_counter() - begun)
            self.drain()
        return statistics.median(times[1:])

    def prefill(self, length: int, requests: int) -> float:
        """Prompt tokens a second."""
        for _ in range(requests):
            self.submit(length, 1)
        begun = time.perf_counter()
        self.drain()
        return length * requests / (time.perf_counter() - begun)

    @contextlib.contextmanager
    def decoding(self, batch: int, length: int, steps: int) -> Iterator[None]:
        """Inside, `batch` sequences of `length` tokens and a few decode; `steps` is how far they may go."""
        waiting = {self.submit(length, steps + 1000) for _ in range(batch)}
        names = list(waiting)
        while waiting:
            waiting -= {event.request_id for event in self.backend.poll(None)}
        for _ in range(SETTLE):
            self.backend.poll(None)
        yield
        for name in names:
            self.backend.cancel(name)
        self.drain()

    def decode(self, steps: int) -> float:
        """Seconds of a step, the median of three runs of `steps`."""
        times = []
        for _ in range(3):
            begun, events = time.perf_counter(), 0
            for _ in range(steps):
                events += len(self.backend.poll(None))
            assert events
            times.append((time.perf_counter() - begun) / steps)
        return statistics.median(times)


def cut_to_fit(args: argparse.Namespace, directory: Path, options: dict[str, Any], pages: int) -> int:
    """Write the shape with as many of its layers, or of those asked for, as the device has room for, beside so many
    pages of the KV cache. How many that are; 0: not one fits."""
    import jax

    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.config import ConfigError
    from moe_jax.executables import resolve
    from moe_jax.llm import engine_config
    from moe_jax.local import device_kind

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    most = json.loads((write_shape(args.shape, args.layers, directory) / "config.json").read_text())[
        "num_hidden_layers"
    ]
    for layers in range(most, 0, -1):
        checkpoint = open_checkpoint(write_shape(args.shape, layers, directory, args.float8), "dummy")
        with contextlib.suppress(ConfigError):
            asked = engine_config(checkpoint.config, 1, device.platform, **options)
            model = resolve(checkpoint, asked, device_kind(device))[0].config
            engine_config(model, 1, device.platform, memory, **options | {"num_pages": pages})
            return layers
    return 0


class ExpertCount:
    """How many experts of a layer the tokens of a decode step hit, by what a step says they chose."""

    def __init__(self, server: Server) -> None:
        engine = server.backend.engine
        assert engine is not None and engine.mesh is not None
        self.engine = engine
        self.bucket = [b for b in engine.buckets if not b.prefill][-1]

    def __call__(self) -> float:
        """The mean over layers, for the sequences that decode now."""
        from moe_jax.executables import Program
        from moe_jax.mesh import SHARDED

        engine = self.engine
        assert engine.mesh is not None
        while engine.in_flight:
            engine.finish()
        scheduler = engine.ranks[0].scheduler
        plan = scheduler.schedule(self.bucket.rows, False)
        vectors = np.zeros((1, engine.config.max_batch), np.int32), engine.layouts[self.bucket].pack(plan)[None]
        leaves = [*engine.fixed, *engine.cache.values(), *(engine.mesh.put([v], SHARDED) for v in vectors)]
        step = engine.programs.load(Program("step", self.bucket, 1), engine.mesh.devices)
        _, _, *rest = step(leaves)
        scheduler.discard(plan)
        chosen = np.asarray(rest[len(engine.cache)][0])  # [layers, rows, choices], -1 for none
        return float(np.mean([len(np.unique(layer[layer >= 0])) for layer in chosen]))


def profile(server: Server, steps: int) -> None:
    """Print where the device's time goes, and how much of it is nothing."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        begun = time.perf_counter()
        with jax.profiler.trace(directory):
            for _ in range(steps):
                server.backend.poll(None)
        wall = (time.perf_counter() - begun) / steps
        spent: dict[str, float] = defaultdict(float)
        calls: Counter[str] = Counter()
        spans: list[tuple[float, float]] = []
        for file in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        name = re.sub(r"(\.clone)?[._]\d+", "", event.name)[:60]
                        spent[name] += event.duration_ns / 1e6 / steps
                        calls[name] += 1
                        spans.append((event.start_ns, event.start_ns + event.duration_ns))
    busy = end = 0.0
    for a, b in sorted(spans):
        busy, end = busy + max(0.0, b - max(a, end)), max(end, b)
    print(f"  traced: {1e3 * wall:.2f} ms a step, device busy {busy / 1e6 / steps:.2f} ms")
    for name, ms in sorted(spent.items(), key=lambda item: -item[1])[:30]:
        print(f"  {ms:8.3f} ms {calls[name] / steps:7.1f} calls  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=[*SHAPES, "demo"])
    parser.add_argument("--layers", type=int, help="fewer than the model has (default: all that fit)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run")
    parser.add_argument("--prefill-rows", type=int, help="prompt tokens in one step (default: the engine's)")
    parser.add_argument("--num-pages", type=int, help="of the KV cache (default: as many as fit)")
    parser.add_argument("--peer-batch", type=int, nargs="*", default=[1, 128], help="none: without transformers")
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="each in turn")
    parser.add_argument("--float8", action="store_true", help="experts in 8 bits, in blocks of 128 x 128 with a scale")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled programs there")
    parser.add_argument("--load-format", choices=["dummy"], default="dummy", help="random weights are all there is")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batches whose steps are traced")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw decoding beside the roofline (moe-jax[plot])")
    parser.add_argument("--as-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        peer(json.loads(sys.stdin.read()))
        return
    results: dict[str, Any] = {"shape": args.shape, "layers": args.layers, "context": args.context, "ours": []}
    results["float8"] = args.float8
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(args.shape, args.layers, Path(directory), args.float8)
        if args.peer_batch:
            theirs = write_shape(args.shape, args.layers, Path(directory) / "peer")  # always bfloat16
            order = {"path": str(theirs), "context": args.context, "batch": args.peer_batch}
            results["transformers"] = run_peer(order | {"steps": min(args.steps, 8)})
            for line in results["transformers"]:
                print("transformers:", json.dumps(line), flush=True)
        import jax
        from _gpu import ceilings

        on_cpu = jax.default_backend() == "cpu"
        flops, bandwidth = ceilings(64 if on_cpu else 1)
        device = jax.devices()[0].device_kind
        experts = ", 8-bit experts" if args.float8 else ""
        print(f"{datetime.date.today()}, {device}, jax {jax.__version__}, {args.shape}{experts}, ", end="")
        print(f"dense product {flops / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e12:.3g} TB/s", flush=True)
        results |= {"device": device, "jax": jax.__version__, "flops": flops, "bandwidth": bandwidth}
        for kernels in args.kernels:
            options: dict[str, Any] = {"kernels": kernels, "max_batch": max(16, *args.batch)}
            options["max_batch"] = -(-options["max_batch"] // 16) * 16
            options["max_model_len"] = args.context + 1024
            if args.prefill_rows:
                options["max_prefill_rows"] = args.prefill_rows
            options["num_pages"] = args.num_pages
            pages = args.num_pages or max(args.batch) * -(-(args.context + 4 * args.steps + 2 * SETTLE) // 64)
            layers = cut_to_fit(args, path, options, pages)
            if layers < (args.layers or 1):
                parser.error(
                    f"--layers: found {args.layers or 'all'}, expected at most {layers}: more do not fit {device}"
                )
            results["ours"].append(measure(args, path, options, flops, bandwidth, results.get("transformers", [])))
    if args.json:
        args.json.write_text(json.dumps(results))
    if args.plot:
        plot(results, args.plot)


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for ours in results["ours"]:
        lines = sorted(ours["decode"], key=lambda line: line["batch"])
        batches, rates = [line["batch"] for line in lines], [line["tokens_per_s"] for line in lines]
        most = [rate / line["roofline"] for rate, line in zip(rates, lines, strict=True)]
        axes.plot(batches, most, "k--", label="roofline")
        axes.plot(batches, rates, "o-", label=f"moe-jax, {ours['kernels']}")
        for line, rate in zip(lines, rates, strict=True):
            axes.annotate(f"{line['roofline']:.0%}", (line["batch"], rate), (6, -12), textcoords="offset points")
    peer = [(line["batch"], line["batch"] / line["step"]) for line in results.get("transformers", []) if "step" in line]
    if peer:
        axes.plot(*zip(*peer, strict=True), "s-", label="transformers")
    axes.set(xscale="log", yscale="log", xlabel="sequences decoded at once", ylabel="tokens/s")
    axes.set(title=f"{results['shape']}, context {results['context']}, {results['device']}")
    axes.legend()
    figure.savefig(path, dpi=110)


def measure(
    args: argparse.Namespace,
    path: Path,
    options: dict[str, Any],
    flops: float,
    bandwidth: float,
    theirs: list[dict[str, Any]],
) -> dict[str, Any]:
    server = Server(path, options, args.cache)
    engine = server.backend.engine
    assert engine is not None
    model, config = engine.model, engine.config
    work = work_of(model, config)
    print(
        f"kernels {engine.programs.engine.kernels}, started in {server.start:.1f} s, {model.num_layers} layers, ",
        end="",
    )
    print(f"{config.num_pages} pages of {config.page_size}, {config.max_prefill_rows} prompt tokens a step", flush=True)
    out: dict[str, Any] = {"kernels": engine.programs.engine.kernels, "start": server.start, "decode": []}
    out |= {"layers": model.num_layers, "num_pages": config.num_pages}
    out["first_token"] = first = server.first_token(args.context)
    server.prefill(args.context, 2)
    out["prefill"] = rate = server.prefill(args.context, max(2, 4 * config.max_prefill_rows // args.context))
    each = work.flops - 2 * model.vocab_size * model.hidden_size + work.attention * args.context / 2
    out["prefill_share"] = share = rate * each / flops
    peer_rate = next((t["prefill"] for t in theirs if "prefill" in t), None)
    print(f"first token of {args.context}: {1e3 * first:.1f} ms; prefill {rate:.0f} tokens/s, ", end="")
    print(
        f"{share:.1%} of the dense rate" + (f", {rate / peer_rate:.2f} x transformers" if peer_rate else ""), flush=True
    )
    count = ExpertCount(server)
    for batch in args.batch:
        with server.decoding(batch, args.context, 4 * args.steps + SETTLE):
            step = server.decode(args.steps)
            if batch in args.profile:
                profile(server, 8)
            hit = count()
        least = work.dense + hit * model.num_moe_layers * work.expert
        least += batch * (args.context + SETTLE + 1.5 * args.steps) * work.position
        line = {"batch": batch, "step": step, "tokens_per_s": batch / step, "hit": hit, "bytes": least}
        line["roofline"] = least / bandwidth / step
        peer_step = next((t["step"] for t in theirs if t.get("batch") == batch), None)
        out["decode"].append(line)
        print(
            f"decode, batch {batch:3d}: {1e3 * step:7.2f} ms a step, {batch / step:7.0f} tokens/s, {hit:.1f} experts "
            f"hit a layer, {least / 1e9:.1f} GB, {line['roofline']:.1%} of the roofline"
            + (f", {peer_step / step:.1f} x transformers" if peer_step else ""),
            flush=True,
        )
    server.backend.close()
    return out


if __name__ == "__main__":
    main()
