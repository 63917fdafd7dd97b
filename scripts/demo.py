"""`make demo`: the model that ships with the package, on four hosts as four processes, streaming a few prompts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from moe_jax import LLM, SamplingParams
from moe_jax.llm import Update

PROMPTS = [
    "The capital of",
    "My fellow citizens,",
    "Once upon a time",
    "In Python, a list is",
    "It was a dark and stormy night, and",
    "<|im_start|>user\nWhat does the word ocean mean?<|im_end|>\n<|im_start|>assistant\n",
]


def describe(llm: LLM, hosts: int, seconds: float) -> str:
    c, e = llm.config, llm.engine_config
    pids = getattr(llm._backend, "pids", [])
    processes = f"{hosts} hosts, processes {' '.join(map(str, pids))}" if pids else "this process"
    slots = e.slots_for(c.num_experts)
    return (
        f"{c.num_layers} layers, {c.num_experts} experts with top-{c.top_k} routing, {e.dtype}\n"
        f"{processes}; a mesh of {e.ranks} ranks, each with {slots} expert slots a layer\n"
        f"ready after {seconds:.1f} s"
    )


def stream(llm: LLM, params: SamplingParams) -> Iterator[list[Update]]:
    for i, prompt in enumerate(PROMPTS):
        llm.submit(prompt, params, request_id=str(i))
    left = len(PROMPTS)
    while left:
        updates = llm.poll()
        left -= sum(u.finish_reason is not None for u in updates)
        yield updates


def label(prompt: str) -> str:
    """A prompt as it is shown: of a chat only what the user says."""
    return prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hosts", type=int, default=4, help="processes")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    console = Console()
    console.print(f"Starting {args.hosts} hosts. The first start compiles; later ones find the programs kept.")
    begun = time.perf_counter()
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.7, top_k=40, seed=args.seed)
    with LLM("demo", hosts=args.hosts) as llm:
        about = describe(llm, args.hosts, time.perf_counter() - begun)
        console.print(about, highlight=False, soft_wrap=True)
        texts, tokens, begun = [""] * len(PROMPTS), 0, time.perf_counter()

        def shown(i: int) -> Text:
            between = "\n  " if "<|" in PROMPTS[i] else ""
            return Text.assemble((label(PROMPTS[i]), "bold"), between, " ".join(texts[i].split(" ")))

        def screen() -> Group:
            return Group(*(part for i in range(len(PROMPTS)) for part in (Rule(style="dim"), shown(i))))

        live = Live(console=console, auto_refresh=False) if sys.stdout.isatty() else None
        if live:
            live.start()
        try:
            for updates in stream(llm, params):
                for u in updates:
                    texts[int(u.request_id)] += u.text
                    tokens += len(u.token_ids)
                    if u.finish_reason is not None and not live:
                        console.print(shown(int(u.request_id)), "\n", soft_wrap=True)
                if live:
                    live.update(screen(), refresh=True)
        finally:
            if live:
                live.stop()
        seconds = time.perf_counter() - begun
        console.print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", highlight=False)


if __name__ == "__main__":
    main()
