"""Compiling before it matters: the same as `moe-jax warmup`, with the same options."""

import sys

from serving.cli import main

if __name__ == "__main__":
    sys.exit(main(["warmup", *sys.argv[1:]]))
