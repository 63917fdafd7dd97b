"""`make demo`: the model that ships with the package, on four hosts as four processes, streaming a few prompts while
one host is killed mid-sentence and comes back.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
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
PHASES = {
    "detect": "the host's connection breaks, or its heartbeats stop",
    "fence": "it is shut out of the mesh, and the others' collectives are aborted",
    "fail": "the survivors get out of these",
    "agree": "the survivors become a numbered epoch, are told, and meet",
    "load": "experts are loaded that nobody holds any more",
    "rebuild": "the same arrays become parts of a smaller mesh",
    "first_step": "with programs that were compiled before; lost requests are prefilled again in it",
    "resume": "until the next token after that",
}
PREPARE = 120.0  # seconds that may be compiled for meshes of fewer hosts
RETURN = 120.0  # seconds that a killed host may take to come back
COLOURS = {"live": "green", "joining": "yellow", "lost": "red"}


@dataclass
class Streams:
    """What has come after each prompt."""

    texts: list[str] = field(default_factory=lambda: [""] * len(PROMPTS))
    tokens: list[list[int]] = field(default_factory=lambda: [[] for _ in PROMPTS])
    left: set[int] = field(default_factory=lambda: set(range(len(PROMPTS))))
    last: dict[int, float] = field(default_factory=dict)  # when a stream's last token came
    gaps: list[tuple[float, float]] = field(default_factory=list)  # from each token of a stream to its next

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    def take(self, i: int, update: Update) -> bool:
        """Whether stream `i` has ended with it."""
        now = time.perf_counter()
        self.gaps.append((self.last.get(i, now), now))
        self.last[i] = now
        self.texts[i] += update.text
        self.tokens[i] += update.token_ids
        if update.finish_reason is not None:
            self.left.discard(i)
        return update.finish_reason is not None


class Hosts:
    """The cluster behind an `LLM`, for those who want to see it suffer."""

    def __init__(self, llm: LLM) -> None:
        self._backend: Any = llm._backend

    def status(self) -> dict[str, Any]:
        return self._backend.status()

    def kill(self, host: str) -> list[int]:
        """SIGKILL to all processes of a host; their ids."""
        ranks = [r for r in self.status()["ranks"] if r["host"] == host and r["supervisor_pid"]]
        for rank in ranks:
            os.killpg(rank["supervisor_pid"], signal.SIGKILL)  # the engine is in its group
        return [pid for rank in ranks for pid in (rank["supervisor_pid"], rank["pid"])]

    def describe(self) -> Text:
        """One line: who lives, and what the cluster is doing."""
        status, parts = self.status(), [Text()]
        for rank in status["ranks"]:
            parts.append(Text(f"{rank['host']} {rank['state']}  ", COLOURS[rank["state"]]))
        return Text.assemble(*parts, f"epoch {status['epoch']}, {status['state']}")


def describe(llm: LLM, hosts: int, seconds: float) -> str:
    c, e = llm.config, llm.engine_config
    pids = [rank["pid"] for rank in Hosts(llm).status()["ranks"]]
    slots = e.slots_for(c.num_experts)
    return (
        f"{c.num_layers} layers, {c.num_experts} experts with top-{c.top_k} routing, {e.dtype}\n"
        f"{hosts} hosts, processes {' '.join(map(str, pids))}; a mesh of {e.ranks} ranks, each with {slots} expert "
        f"slots a layer\n"
        f"ready after {seconds:.1f} s"
    )


def label(prompt: str) -> str:
    """A prompt as it is shown: of a chat only what the user says."""
    return prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]


def serve(llm: LLM, params: SamplingParams, look: Callable[[Streams, list[int]], None]) -> Streams:
    """Stream all prompts. `look` is called several times a second with what there is, and the streams that ended."""
    streams, number = Streams(), {llm.submit(prompt, params): i for i, prompt in enumerate(PROMPTS)}
    while streams.left:
        updates = [(number[update.request_id], update) for update in llm.poll(0.1)]
        look(streams, [i for i, update in updates if streams.take(i, update)])
    return streams


class Screen:
    """The streams as they grow: all at once on a terminal, else each when it has ended."""

    def __init__(self, console: Console, hosts: Hosts) -> None:
        self._console, self._hosts = console, hosts
        self._live = Live(console=console, auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, streams: Streams, ended: list[int]) -> None:
        if self._live:
            rows = [part for i in range(len(PROMPTS)) for part in (Rule(style="dim"), _shown(streams, i))]
            self._live.update(Group(*rows, Rule(style="dim"), self._hosts.describe()), refresh=True)
        else:
            for i in ended:
                self._console.print(_shown(streams, i), "\n", soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(text, style="bold red", highlight=False, soft_wrap=True)


def _shown(streams: Streams, i: int) -> Text:
    between = "\n  " if "<|" in PROMPTS[i] else ""
    return Text.assemble((label(PROMPTS[i]), "bold"), between, " ".join(streams.texts[i].split(" ")))


@dataclass
class Loss:
    """A host that was killed. Times as perf_counter."""

    host: str
    pids: list[int] = field(default_factory=list)
    at: float = 0.0  # 0: not yet
    back: float = 0.0

    def look(self, hosts: Hosts) -> None:
        own = [rank for rank in hosts.status()["ranks"] if rank["host"] == self.host]
        if self.at and not self.back and all(r["state"] == "live" and r["pid"] not in self.pids for r in own):
            self.back = time.perf_counter()


def serve_and_kill(llm: LLM, params: SamplingParams, console: Console, loss: Loss, after: int) -> Streams:
    """Stream all prompts, and kill the host once `after` tokens are there."""
    hosts = Hosts(llm)
    with Screen(console, hosts) as screen:

        def look(streams: Streams, ended: list[int]) -> None:
            screen.show(streams, ended)
            if not loss.at and streams.count >= after:
                loss.pids, loss.at = hosts.kill(loss.host), time.perf_counter()
                screen.say(
                    f"kill -9 {' '.join(map(str, loss.pids))}: {loss.host} is gone, after {streams.count} tokens\n"
                )
            loss.look(hosts)

        return serve(llm, params, look)


def timeline(recovery: dict[str, Any], streams: Streams, loss: Loss) -> Table:
    table = Table("", "ms", "", title=f"Epoch {recovery['epoch']}, without the lost host", title_justify="left")
    for phase, meaning in PHASES.items():
        ms = recovery.get(f"{phase}_ms")
        if ms is not None:
            table.add_row(phase.replace("_", " "), f"{ms:.1f}", meaning)
    table.add_section()
    across = max((end - begin for begin, end in streams.gaps if begin <= loss.at < end), default=0.0)
    later = max((end - begin for begin, end in streams.gaps if begin > loss.at), default=0.0)
    table.add_row("pause", f"{1e3 * across:.0f}", "the longest between two tokens of a stream, as read here")
    table.add_row("later", f"{1e3 * later:.0f}", "the same since then: the host's return, if it was in time")
    table.columns[1].justify = "right"
    return table


def wait_for_programs(hosts: Hosts, number: int) -> float:
    """Seconds until nothing is compiled any more for the loss of one or two of `number` hosts; at most PREPARE."""
    begun, wanted = time.perf_counter(), min(2, number - 1)
    while hosts.status()["survivable_without_compiling"] < wanted and time.perf_counter() - begun < PREPARE:
        time.sleep(0.05)
    return time.perf_counter() - begun


def wait_for(hosts: Hosts, loss: Loss) -> dict[str, Any]:
    """The status once the host is back. Raises TimeoutError."""
    while not loss.back:
        if time.perf_counter() - loss.at > RETURN:
            raise TimeoutError(f"{loss.host} is not back after {RETURN:g} s; {hosts.describe()}")
        time.sleep(0.02)
        loss.look(hosts)
    return hosts.status()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--hosts", type=int, default=4, help="processes, at least 2")
    parser.add_argument("--kill", type=int, metavar="I", help="the host to kill (default: the one in the middle)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if args.hosts < 2:
        parser.error(f"--hosts: found {args.hosts}, expected at least 2, since one is killed")
    if args.kill is not None and not 0 <= args.kill < args.hosts:
        parser.error(f"--kill: found {args.kill}, expected 0 to {args.hosts - 1}")
    loss = Loss(f"host{args.hosts // 2 if args.kill is None else args.kill}")

    console = Console()
    console.print(f"Starting {args.hosts} hosts. The first start compiles; later ones find the programs kept.")
    begun = time.perf_counter()
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.7, top_k=40, seed=args.seed)
    with LLM("demo", hosts=args.hosts) as llm:
        hosts = Hosts(llm)
        console.print(describe(llm, args.hosts, time.perf_counter() - begun), highlight=False, soft_wrap=True)
        seconds = wait_for_programs(hosts, args.hosts)
        console.print(f"for meshes of fewer hosts, too, {seconds:.1f} s later", highlight=False)

        begun = time.perf_counter()
        expected = serve(llm, params, lambda streams, ended: None)
        seconds = time.perf_counter() - begun
        console.print(
            f"{len(PROMPTS)} prompts undisturbed: {expected.count} tokens in {seconds:.1f} s, "
            f"{expected.count / seconds:.0f} tokens/s\n"
            f"The same once more, and {loss.host} will be killed:\n",
            highlight=False,
        )
        streams = serve_and_kill(llm, params, console, loss, expected.count // 3)
        recovery = next(r for r in hosts.status()["recoveries"] if r["lost"])
        console.print(timeline(recovery, streams, loss), highlight=False)

        status = wait_for(hosts, loss)
        pids = [rank["pid"] for rank in status["ranks"] if rank["host"] == loss.host]
        console.print(
            f"{loss.host} is back, {loss.back - loss.at:.1f} s after the kill: process {' '.join(map(str, pids))}, "
            f"epoch {status['epoch']}, {status['experts']['missing']} experts missing",
            highlight=False,
        )
        same = sum(a == b for a, b in zip(streams.tokens, expected.tokens, strict=True))
        console.print(
            f"{same} of {len(PROMPTS)} texts are the same as without the kill, token for token",
            style="bold green" if same == len(PROMPTS) else "bold red",
            highlight=False,
        )
    return 0 if same == len(PROMPTS) else 1


if __name__ == "__main__":
    sys.exit(main())
