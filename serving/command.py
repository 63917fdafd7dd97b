"""What the commands of `moe-jax` share: what one is, how it fails, and the types of arguments.

A command is a pair of functions: one adds its options to a parser, one does what they ask. The latter imports what it
needs itself, the runtime and so JAX above all, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DEFAULT_ADDRESS = "127.0.0.1:50051"  # of a coordinator


class UsageError(Exception):
    """What the user must change; becomes one line on stderr and exit code 2."""


class Failure(Exception):
    """What went wrong for another reason; becomes one line on stderr and exit code 1."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its options, and what it does with them.

    `run` returns the exit code. It raises UsageError, Failure, or OSError (the disk is full, a file vanished); any
    other error is a bug, whose traceback is shown.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors that name what the user gave: a missing model, a broken file, an impossible option."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UsageError(str(error)) from error


def address(text: str) -> str:
    """HOST:PORT, and the port may be 0."""
    host, _, number = text.rpartition(":")
    if not host or not (number.isascii() and number.isdigit()) or int(number) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, found {text!r}")
    return text


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a port, found {text!r}")
    return int(text)


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


natural.__name__ = positive.__name__ = "integer"  # argparse names the type: "invalid integer value: 'x'"
