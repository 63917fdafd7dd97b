"""The command line `moe-jax`: the table of commands, the parser, and what becomes of errors.

It turns arguments into calls and errors into exit codes: 0 done, 1 failed, 2 bad input (one line on stderr, no
traceback), 130 interrupted. It must not know how anything is done, nor what options a command has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from serving import (
    admin_commands,
    convert_command,
    generate_command,
    key_command,
    plan_command,
    serve_command,
    warmup_command,
    worker_command,
)
from serving.command import Command, Failure, UsageError
from serving.generate_command import LLMFactory


def main(argv: Sequence[str] | None = None, llm_factory: LLMFactory | None = None) -> int:
    """Runs one command and returns its exit code. `llm_factory` stands in for `moe_jax.LLM`, for tests."""
    parser = _parser()
    try:
        args = parser.parse_args(argv, argparse.Namespace(llm_factory=llm_factory))
    except SystemExit as leave:  # --help: 0, bad arguments: 2, both already said
        return leave.code if isinstance(leave.code, int) else 2
    command: Command = args.command
    try:
        return command.run(args)
    except UsageError as error:
        _say(command, str(error))
        return 2
    except KeyboardInterrupt:
        _say(command, "interrupted")
        return 130
    except (Failure, OSError) as error:
        _say(command, str(error))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-jax", description="Serve Mixture-of-Experts models with JAX, through the loss of hosts."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        command.configure(sub)
        sub.set_defaults(command=command)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, []) else action.help


def _say(command: Command, message: str) -> None:
    print(f"moe-jax {command.name}: {' '.join(message.split())}", file=sys.stderr)


COMMANDS: tuple[Command, ...] = (
    Command("generate", "Generate for a file of prompts.", generate_command.configure, generate_command.run),
    Command(
        "serve",
        "Serve a model over gRPC: a coordinator and its workers.",
        serve_command.configure,
        serve_command.run,
    ),
    Command(
        "worker",
        "Run one rank of a cluster whose coordinator is elsewhere.",
        worker_command.configure,
        worker_command.run,
    ),
    Command("status", "Show what a cluster is doing.", admin_commands.configure_status, admin_commands.run_status),
    Command("top", "Show what a cluster is doing, live.", admin_commands.configure_top, admin_commands.run_top),
    Command(
        "health", "Say whether new requests are served.", admin_commands.configure_health, admin_commands.run_health
    ),
    Command(
        "drain",
        "Move a host's requests to others and let it leave.",
        admin_commands.configure_drain,
        admin_commands.run_drain,
    ),
    Command(
        "undrain",
        "Take a drained host back, whose workers the server starts.",
        admin_commands.configure_undrain,
        admin_commands.run_undrain,
    ),
    Command(
        "rebalance",
        "Move experts to where their load is even.",
        admin_commands.configure_rebalance,
        admin_commands.run_rebalance,
    ),
    Command("key", "Draw an API key.", key_command.configure, key_command.run),
    Command("plan", "Place experts, and say what the placement survives.", plan_command.configure, plan_command.run),
    Command("warmup", "Compile what a cluster and its losses need.", warmup_command.configure, warmup_command.run),
    Command("convert", "Write a serving checkpoint of a model.", convert_command.configure, convert_command.run),
)

if __name__ == "__main__":
    sys.exit(main())
