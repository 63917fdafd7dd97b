"""Tokens per second on this CPU, against `transformers` generating the same batch with the same weights.

    python scripts/bench_cpu.py [--json] [--profile]

32 prompts of 8 to 64 tokens, 64 greedy tokens each, float32. Contenders take turns, so that whatever else the machine
does meets all of them; the median and the spread of the rounds are reported. `transformers` runs with the fastest of
its expert implementations, found first. --profile adds where a step's time goes: on the host, phase by phase, and on
the device, from a profiler trace.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import moe_jax.engine
from moe_jax import LLM, SamplingParams
from moe_jax.batch_input import Layout
from moe_jax.executables import Executables, Program
from moe_jax.llm import model_directory
from moe_jax.mesh import ExpertMesh
from moe_jax.text import Tokenizer

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
# Jane Austen, Pride and Prejudice, and Herman Melville, Moby-Dick: in the public domain.
TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a \
wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, \
this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful \
property of some one or other of their daughters.
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and \
nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the \
world. It is a way I have of driving off the spleen and regulating the circulation.
Mr. Bennet was so odd a mixture of quick parts, sarcastic humour, reserve, and caprice, that the experience of \
three and twenty years had been insufficient to make his wife understand his character. Her mind was less \
difficult to develop. She was a woman of mean understanding, little information, and uncertain temper.
There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs; \
commerce surrounds it with her surf. Right and left, the streets take you waterward. Its extreme downtown is the \
battery, where that noble mole is washed by waves, and cooled by breezes, which a few hours previous were out of \
sight of land.
Within a short walk of Longbourn lived a family with whom the Bennets were particularly intimate. Sir William \
Lucas had been formerly in trade in Meryton, where he had made a tolerable fortune, and risen to the honour of \
knighthood by an address to the king during his mayoralty. The distinction had perhaps been felt too strongly.
Now, when I say that I am in the habit of going to sea whenever I begin to grow hazy about the eyes, and begin \
to be over conscious of my lungs, I do not mean to have it inferred that I ever go to sea as a passenger. For to \
go as a passenger you must needs have a purse, and a purse is but a rag unless you have something in it.
"""

Generate = Callable[[], list[list[int]]]  # the tokens after each prompt


def make_prompts(tokenizer: Tokenizer, count: int, shortest: int = 8, longest: int = 64) -> list[list[int]]:
    """`count` prompts that begin where sentences begin, their lengths spread evenly and mixed up."""
    starts = [0, *(m.end() for m in re.finditer(r"(?<!Mr)\.\s", TEXT))]
    texts = [ids for ids in (tokenizer.encode(TEXT[s:]) for s in starts) if len(ids) >= longest]
    lengths = [shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count)]
    return [texts[i % len(texts)][: lengths[i * 13 % count]] for i in range(count)]


def open_ours(prompts: list[list[int]], max_tokens: int, ranks: int) -> tuple[LLM, Generate]:
    # Every round sends the same prompts: a prefix cache would skip most of the prefill. A batch has no use for short
    # steps, in which some go on while others begin.
    options = {"max_batch": 32, "max_prefill_rows": 512, "prefix_caching": False, "dtype": "float32"}
    llm = LLM("demo", ranks_per_host=ranks, **options)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return llm, lambda: [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params)]


def open_transformers(prompts: list[list[int]], max_tokens: int, threads: int) -> tuple[Any, Generate]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_directory("demo"), dtype=torch.float32).eval()
    # No end of sequence: it neither stops nor is masked, as with ignore_eos.
    model.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask)[:, width:].tolist()

    return model, generate


def timed(generate: Generate) -> tuple[float, list[list[int]]]:
    begun = time.perf_counter()
    tokens = generate()
    return time.perf_counter() - begun, tokens


def fastest_implementation(model: Any, generate: Generate) -> tuple[str, dict[str, float]]:
    """Leaves the model with it. Also the seconds of each; the first of two runs warms up."""
    seconds: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
            generate()
            seconds[name] = timed(generate)[0]
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            print(f"transformers cannot run {name}: {str(error).splitlines()[0]}")
    best = min(seconds, key=lambda name: seconds[name])
    model.set_experts_implementation(best)
    return best, seconds


def machine() -> dict[str, Any]:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return {"cpu": found[1] if found else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    return {"cpu": platform.processor(), "cores": os.cpu_count()}


def versions() -> dict[str, str]:
    packages = ("moe-jax", "jax", "jaxlib", "torch", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def compare(args: argparse.Namespace, prompts: list[list[int]], opened: dict[int, Generate]) -> dict[str, Any]:
    where = machine()
    model, reference = open_transformers(prompts, args.max_tokens, where["cores"])
    implementation, tried = fastest_implementation(model, reference)
    theirs = f"transformers, {implementation}"
    contenders = {f"moe-jax, ranks={ranks}": generate for ranks, generate in opened.items()} | {theirs: reference}
    outputs = {name: generate() for name, generate in contenders.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, generate in contenders.items():
            time.sleep(0.2)  # until the last one's idle threads stop spinning
            seconds[name].append(timed(generate)[0])
    total = len(prompts) * args.max_tokens
    assert all(len(o) == args.max_tokens for output in outputs.values() for o in output)
    expected = outputs[theirs]
    rows = {
        name: {
            "tokens_per_second": round(total / statistics.median(s), 1),
            "slowest": round(total / max(s), 1),
            "fastest": round(total / min(s), 1),
            "same_tokens": sum(a == b for a, b in zip(outputs[name], expected, strict=True)),
        }
        for name, s in seconds.items()
    }
    best = max(row["tokens_per_second"] for name, row in rows.items() if name != theirs)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **where,
        "versions": versions(),
        "prompts": len(prompts),
        "max_tokens": args.max_tokens,
        "rounds": args.rounds,
        "results": rows,
        "transformers_tried": {name: round(total / s, 1) for name, s in tried.items()},
        "speedup": round(best / rows[theirs]["tokens_per_second"], 2),
    }


def show(console: Console, r: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
    console.print(f"{r['cpu']}, {r['cores']} cores; {r['date']}; {packages}", highlight=False, soft_wrap=True)
    title = f"{r['prompts']} prompts of 8 to 64 tokens, {r['max_tokens']} greedy tokens each, float32"
    table = Table("", "tokens/s", f"slowest – fastest of {r['rounds']}", f"same tokens, of {r['prompts']}", title=title)
    for name, row in r["results"].items():
        spread = f"{row['slowest']} – {row['fastest']}"
        table.add_row(name, str(row["tokens_per_second"]), spread, str(row["same_tokens"]))
    console.print(table)
    tried = ", ".join(f"{name} {rate}" for name, rate in r["transformers_tried"].items())
    console.print(f"transformers' expert implementations, one run each: {tried} tokens/s")
    console.print(f"speed-up, medians of the best of each: {r['speedup']}")


# Where the time goes


@contextlib.contextmanager
def host_phases() -> Iterator[dict[str, float]]:
    """Seconds that the engine spends in each phase while the block runs, from wrapped methods; "steps" counts them."""
    spent: dict[str, float] = defaultdict(float)
    undo: list[tuple[Any, str, Any]] = []

    def clocked(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[phase] += time.perf_counter() - begun
                spent["steps"] += phase == "finish"

        return wrapper

    def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, make(getattr(owner, name)))

    def loaded(load: Any) -> Any:
        def load_timed(self: Executables, program: Program, devices: Any) -> Any:
            return clocked(f"dispatch of the {program.kind}", load(self, program, devices))

        return load_timed

    engine = moe_jax.engine
    for phase, owner, name in (
        ("schedule", engine.Engine, "_plan"),
        ("wish", engine.Engine, "_level"),
        ("pack", Layout, "pack"),
        ("copy to the devices", ExpertMesh, "put"),
        ("unpack", engine, "unpack_output"),
        ("tokens to requests", engine.Scheduler, "complete"),
        ("begin", engine.Engine, "_begin"),
        ("finish", engine.Engine, "finish"),
    ):
        replace(owner, name, functools.partial(clocked, phase))
    replace(Executables, "load", loaded)
    try:
        yield spent
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def device_ops(directory: Path) -> dict[str, float]:
    """Seconds of each XLA operation in a trace, without what ran inside it, by program and name without number."""
    spent: dict[str, float] = defaultdict(float)
    for file in directory.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                add_self_times(spent, line.events)
    return spent


def add_self_times(spent: dict[str, float], events: Any) -> None:
    """Events of one thread: an event that lies in another is inside it, and its time is not the other's."""
    stack: list[tuple[float, str]] = []  # end, name
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while stack and stack[-1][0] <= event.start_ns:
            stack.pop()
        name = operation(event)
        if name is None:
            continue
        if stack:
            spent[stack[-1][1]] -= event.duration_ns / 1e9
        spent[name] += event.duration_ns / 1e9
        stack.append((event.start_ns + event.duration_ns, name))


def operation(event: Any) -> str | None:
    """ "step: dot", or None for what is no operation of a program."""
    stats = dict(event.stats)
    if "hlo_op" not in stats:
        return None
    module = str(stats.get("hlo_module", "")).removeprefix("jit_")
    kind = re.sub(r"(\.clone)?(\.\d+)*$", "", str(stats["hlo_op"]))
    return f"{module}: {kind}"


def profile(opened: dict[int, Generate], top: int = 12) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for ranks, generate in opened.items():
        with host_phases() as spent:
            whole, _ = timed(generate)
        steps, begin, finish = (spent.pop(name) for name in ("steps", "begin", "finish"))
        spent["wait for the devices"] = finish - spent["unpack"] - spent["tokens to requests"]
        spent["outside of the engine, beside the devices' work"] = whole - begin - finish
        spent["the rest"] = whole - sum(spent.values())
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                generate()
            ops = device_ops(Path(directory))
        out[str(ranks)] = {
            "steps": int(steps),
            "step_ms": round(1e3 * whole / steps, 3),
            "host_ms_per_step": {k: round(1e3 * v / steps, 3) for k, v in spent.items()},
            "device_ms_per_step": {
                k: round(1e3 * v / steps, 3) for k, v in sorted(ops.items(), key=lambda item: -item[1])[:top]
            },
            "device_ms_per_step_all": round(1e3 * sum(ops.values()) / steps, 3),
        }
    return out


def show_profile(console: Console, results: dict[str, Any]) -> None:
    for ranks, r in results.items():
        title = f"ranks={ranks}: {r['steps']} steps of {r['step_ms']} ms"
        table = Table("host, engine's thread", "ms a step", "%", title=title)
        for phase, ms in sorted(r["host_ms_per_step"].items(), key=lambda item: -item[1]):
            table.add_row(phase, f"{ms:.3f}", f"{100 * ms / r['step_ms']:.1f}")
        console.print(table)
        whole = r["device_ms_per_step_all"]
        title = f"{whole} ms of operations a step, with tracing on"
        table = Table("device, all threads", "ms a step", "%", title=title)
        for name, ms in r["device_ms_per_step"].items():
            table.add_row(name, f"{ms:.3f}", f"{100 * ms / max(whole, 1e-9):.1f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second on this CPU.", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1], help="mesh sizes to measure")
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes")
    parser.add_argument("--no-compare", action="store_true", help="without transformers")
    parser.add_argument("--json", action="store_true", help="print one JSON line after the table")
    args = parser.parse_args()

    console = Console()
    prompts = make_prompts(Tokenizer.from_directory(model_directory("demo")), args.prompts)
    llms: list[LLM] = []
    opened: dict[int, Generate] = {}
    result: dict[str, Any] = {}
    try:
        for ranks in sorted(set(args.ranks), reverse=True):  # devices are made for the first
            llm, opened[ranks] = open_ours(prompts, args.max_tokens, ranks)
            llms.append(llm)
        if not args.no_compare:
            result = compare(args, prompts, opened)
            show(console, result)
        if args.profile:
            result["profile"] = profile(opened)
            show_profile(console, result["profile"])
    finally:
        for llm in llms:
            llm.close()
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
