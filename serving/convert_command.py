"""`moe-jax convert`: writes a checkpoint of stacked experts, of which a rank can read its own and no others."""

from __future__ import annotations

import argparse
import json
import sys
import time

from serving.command import bad_input


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face model directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the serving checkpoint goes")
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    with bad_input():
        from moe_jax import checkpoint
        from moe_jax.llm import model_directory

        checkpoint.convert(model_directory(args.model), args.output)
    seconds = round(time.monotonic() - started, 3)
    if args.json:
        print(json.dumps({"model": args.model, "output": args.output, "seconds": seconds}))
    else:
        print(f"{args.model} → {args.output} in {seconds} s", file=sys.stderr)
    return 0
