"""`moe-jax serve`: a coordinator, and its workers unless others start them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serving.command import DEFAULT_ADDRESS, Failure, address, bad_input, port, positive
from serving.credentials import add_server, server_credentials
from serving.model_options import add_model_options, llm_options

if TYPE_CHECKING:
    from serving.options import Options


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--address", type=address, default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="port 0: any free one"
    )
    group.add_argument(
        "--workers", choices=("local", "none"), default="local", help="none: they are started on other machines"
    )
    group.add_argument("--no-restart", action="store_true", help="leave it to others to start lost workers again")
    group.add_argument("--platform", choices=("cpu", "cuda"), help="of the workers (default: a GPU if there is one)")
    group.add_argument("--journal", type=Path, metavar="DIR", help="requests are kept there and outlive this process")
    group.add_argument("--log-dir", type=Path, metavar="DIR", help="a log of each local worker")
    group.add_argument("--openai-port", type=port, metavar="PORT", help="OpenAI's HTTP interface, by the gateway smg")
    group.add_argument("--otlp", metavar="URL", help="send traces to this OpenTelemetry collector (gRPC)")
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="json: an object a line")
    group.add_argument("--web", type=address, metavar="HOST:PORT", help="serve a status page and /metrics there")
    group.add_argument(
        "--rebalance-above",
        type=float,
        default=1.25,
        metavar="X",
        help="move experts when the most loaded rank has X times the mean load; 0: never by itself",
    )
    group.add_argument("--max-queue-tokens", type=positive, metavar="N", help="of all requests that are accepted")
    group.add_argument(
        "--max-queue-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="that a request may have to wait for its turn",
    )
    group.add_argument("--max-output-tokens", type=positive, metavar="N", help="that one request may ask for")
    group.add_argument(
        "--grace", type=float, default=20.0, metavar="S", help="seconds for accepted requests to finish after SIGTERM"
    )
    add_server(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints one line when requests are served; ends when SIGTERM or SIGINT comes, with exit code 0."""
    import asyncio
    import logging

    from moe_jax.llm import model_directory
    from serving.environment import guess_platform
    from serving.options import Options

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    given = llm_options(args)
    own = {name: given.pop(name) for name in ("hosts", "ranks_per_host", "load_format") if name in given}
    with bad_input():
        options = Options(
            model=model_directory(given.pop("model")),
            address=args.address,
            platform=args.platform or guess_platform(os.environ.get("JAX_PLATFORMS")),
            engine=given,
            workers=args.workers == "local",
            restart=not args.no_restart,
            journal=args.journal,
            log_dir=args.log_dir,
            rebalance_above=args.rebalance_above,
            max_queue_tokens=args.max_queue_tokens,
            max_queue_seconds=args.max_queue_seconds,
            max_output_tokens=args.max_output_tokens,
            grace=args.grace,
            web=args.web,
            openai_port=args.openai_port,
            otlp=args.otlp,
            log_json=args.log_format == "json",
            **server_credentials(args, args.workers == "local"),
            **own,
        )
        try:
            asyncio.run(_serve(options, lambda line: print(line, flush=True)))
        except RuntimeError as error:
            raise Failure(str(error)) from error
    return 0


async def _serve(options: Options, say: Callable[[str], None]) -> None:
    """With a journal the coordinator may die, and so it is a process of its own, apart from what starts it."""
    if options.openai_port is not None:
        from serving import gateway

        gateway.find()
    if options.journal is not None:
        from serving.keeper import keep

        return await keep(options, say)
    from serving import server

    await server.serve(options, *server.prepare(options), say)
