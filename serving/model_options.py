"""Options of the command line that say which model, and how an engine runs it."""

from __future__ import annotations

import argparse
from typing import Any

from serving.command import positive

_LLM_OPTIONS = (
    *("dtype", "slots", "replication", "ranks_per_host", "load_format", "kernels"),
    *("max_model_len", "max_batch", "max_prefill_rows", "page_size", "num_pages", "deterministic"),
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What LLM takes, for every command that loads a model. Options left out keep LLM's own defaults."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo", metavar="DIR", help="'demo' or a model directory")
    group.add_argument("--hosts", type=positive, default=1, metavar="N", help="hosts that share the experts")
    rest = {"metavar": "N", "type": positive, "default": argparse.SUPPRESS}
    group.add_argument("--ranks-per-host", **rest, help="worker processes of one host")
    group.add_argument("--slots", **rest, help="expert slots per layer and rank (default: fewest that replicate)")
    group.add_argument("--replication", **rest, help="hosts that hold each expert")
    group.add_argument("--max-model-len", **rest, help="longest prompt and output together, in tokens")
    group.add_argument("--max-batch", **rest, help="requests decoded at once by a rank")
    group.add_argument("--max-prefill-rows", **rest, help="prompt tokens that a rank takes in one step")
    group.add_argument("--page-size", **rest, help="tokens in a page of the KV cache")
    group.add_argument("--num-pages", **rest, help="pages of a rank's KV cache")
    group.add_argument("--dtype", default=argparse.SUPPRESS, help="float32, bfloat16, … (default: the checkpoint's)")
    group.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="the same bits whatever runs beside a request and on however many hosts (default: on a CPU)",
    )
    group.add_argument(
        "--load-format", choices=("auto", "dummy"), default=argparse.SUPPRESS, help="dummy: random weights, no files"
    )
    group.add_argument(
        "--kernels",
        choices=("auto", "native", "hopper", "xla", "reference"),
        default=argparse.SUPPRESS,
        help="default: auto: native on a CPU with a C++ compiler, hopper (Pallas) on H100 and H200, else xla",
    )


def llm_options(args: argparse.Namespace) -> dict[str, Any]:
    """LLM's keyword arguments."""
    given = vars(args)
    return {name: given[name] for name in ("model", "hosts", *_LLM_OPTIONS) if name in given}
