"""`moe-jax generate`: a file of prompts in, a file of results out; what moe_jax.batch does, with progress on stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from serving.command import UsageError, bad_input, positive
from serving.model_options import add_model_options, llm_options

if TYPE_CHECKING:
    from moe_jax.batch import Counts

LLMFactory = Callable[..., Any]  # called as LLM is; returns a context manager that gives an Engine (moe_jax.batch)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="FILE", help="prompts, one JSON object a line")
    parser.add_argument("--output", required=True, metavar="FILE", help="results; lines already there are not redone")
    add_model_options(parser)
    group = parser.add_argument_group("sampling, where a line does not say")
    group.add_argument("--max-tokens", type=int, default=16, metavar="N", help="tokens to generate at most")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off")
    group.add_argument("--seed", type=int, metavar="S", help="each line's seed derives from this and its custom_id")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end of sequence")
    group = parser.add_argument_group("run")
    group.add_argument("--retry-errors", action="store_true", help="redo the output's lines that are errors")
    group.add_argument("--in-flight", type=positive, default=256, metavar="N", help="requests in the engine at once")
    group.add_argument("--json", action="store_true", help="print a summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """args.llm_factory: stands in for LLM, or None."""
    from moe_jax import batch
    from moe_jax.request import SamplingParams

    with bad_input():
        if args.seed is not None and args.seed < 0:
            raise ValueError(f"--seed must not be negative, found {args.seed}")
        defaults = SamplingParams(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop=tuple(args.stop),
            ignore_eos=args.ignore_eos,
        )
    options = batch.Options(
        defaults=defaults,
        seed=args.seed,
        model=str(args.model),
        retry_errors=args.retry_errors,
        in_flight=args.in_flight,
    )
    llm_factory: LLMFactory = args.llm_factory or _llm
    with contextlib.ExitStack() as stack:

        def connect() -> batch.Engine:
            with bad_input():
                return stack.enter_context(llm_factory(**llm_options(args)))

        progress = stack.enter_context(_progress())
        try:
            counts = batch.run(args.input, args.output, connect, options, progress)
        except batch.BatchError as error:
            raise UsageError(str(error)) from error
        summary = {
            "requests": counts.requests,
            "errors": counts.errors,
            "skipped": counts.skipped,
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "seconds": round(counts.seconds, 3),
            "tokens_per_second": round(counts.tokens_per_second, 1),
            "output": str(args.output),
        }
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            "{requests} requests ({skipped} from an earlier run, {errors} errors), {completion_tokens} tokens in "
            "{seconds} s, {tokens_per_second} tokens/s: {output}".format(**summary),
            file=sys.stderr,
        )
    return 0


def _llm(**options: Any) -> Any:
    from moe_jax import LLM

    return LLM(**options)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Counts], None]]:
    """Shows a run on stderr: a bar on a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield _Lines().update
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("", total=None)
        shown = 0.0

        def update(counts: Counts) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown > 0.2 or counts.requests == counts.total:
                shown = now
                bar.update(task, total=counts.total, completed=counts.requests, description=_rates(counts))

        yield update


class _Lines:
    """Progress for logs."""

    def __init__(self, every: float = 5.0):
        self.every = every
        self.last = time.monotonic()

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            print(f"{counts.requests}/{counts.total or '?'} requests, {_rates(counts)}", file=sys.stderr, flush=True)


def _rates(counts: Counts) -> str:
    eta = counts.eta_seconds
    left = "" if eta is None else f", ETA {int(eta) // 3600}:{int(eta) // 60 % 60:02}:{int(eta) % 60:02}"
    errors = f", {counts.errors} errors" if counts.errors else ""
    return f"{counts.tokens_per_second:.1f} tokens/s{left}{errors}"
