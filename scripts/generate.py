"""Batch generation from a file of prompts: the same as `moe-jax generate`, with the same options."""

import sys

from serving.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
