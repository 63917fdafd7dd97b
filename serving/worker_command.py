"""`moe-jax worker`: one rank of a cluster whose coordinator is elsewhere."""

from __future__ import annotations

import argparse
import os

from serving.command import address, bad_input, natural
from serving.credentials import add_credentials, credentials


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--coordinator", type=address, required=True, metavar="HOST:PORT", help="where it listens")
    parser.add_argument("--rank", type=natural, required=True, metavar="R", help="this worker's number, from 0")
    parser.add_argument("--host", required=True, metavar="NAME", help="label of the failure domain it belongs to")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--gpu", type=natural, metavar="I", help="which visible GPU (default: that of the rank)")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help="seconds to go on uncoordinated")
    parser.add_argument(
        "--grace", type=float, default=20.0, metavar="S", help="seconds for its requests to move away after SIGTERM"
    )
    add_credentials(parser)


def run(args: argparse.Namespace) -> int:
    """Exit codes as in serving.worker: 75 says that the coordinator has dismissed it."""
    import asyncio

    from serving import worker
    from serving.environment import guess_platform

    with bad_input():
        platform = args.platform or guess_platform(os.environ.get("JAX_PLATFORMS"))
        given = credentials(args)
        options = worker.Options(
            args.coordinator, args.rank, args.host, platform, args.patience, args.grace, gpu=args.gpu, **given
        )
        return asyncio.run(worker.supervise(options))
