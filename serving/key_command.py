"""`moe-jax key`: draws an API key."""

from __future__ import annotations

import argparse
import json
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of whoever is to use it")
    parser.add_argument("--admin", action="store_true", help="it may also drain hosts and the like")


def run(args: argparse.Namespace) -> int:
    """The key goes to stdout, once; what the file of keys has of it to stderr."""
    from serving.access import draw_key

    key, digest = draw_key()
    print(key)
    print(f'\nfor the file of --api-keys:\n\n[{json.dumps(args.name)}]\nsha256 = "{digest}"', file=sys.stderr)
    if args.admin:
        print("admin = true", file=sys.stderr)
    return 0
