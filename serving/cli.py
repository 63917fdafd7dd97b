"""The command line `moe-jax`: one function a subcommand, listed in COMMANDS.

It turns arguments into calls and errors into exit codes: 0 done, 1 failed, 2 bad input (one line on stderr, no
traceback), 130 interrupted. It must not know how anything is done, and it imports the runtime, and so JAX, only
inside the commands that need it, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving import plan_command, warmup_command
from serving.credentials import add_client, add_credentials, add_server

if TYPE_CHECKING:
    from moe_jax.batch import Counts
    from serving.options import Options

LLMFactory = Callable[..., Any]  # called as LLM is; returns a context manager that gives an Engine (moe_jax.batch)


class UsageError(Exception):
    """What the user must change; becomes one line on stderr and exit code 2."""


class Failure(Exception):
    """What went wrong for another reason; becomes one line on stderr and exit code 1."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its options, and what it does with them. `run` returns the exit code."""

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, LLMFactory], int]


def main(argv: Sequence[str] | None = None, llm_factory: LLMFactory | None = None) -> int:
    """Runs one command and returns its exit code. `llm_factory` stands in for `moe_jax.LLM`."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as leave:  # --help: 0, bad arguments: 2, both already said
        return leave.code if isinstance(leave.code, int) else 2
    command: Command = args.command
    try:
        return command.run(args, llm_factory or _llm)
    except UsageError as error:
        _say(command, str(error))
        return 2
    except KeyboardInterrupt:
        _say(command, "interrupted")
        return 130
    except (Failure, OSError) as error:  # the disk is full, a file vanished
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


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Errors that name what the user gave: a missing model, a broken file, an impossible option."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UsageError(str(error)) from error


def _llm(**options: Any) -> Any:
    from moe_jax import LLM

    return LLM(**options)


# -- generate -------------------------------------------------------------------------------------------------------

_LLM_OPTIONS = (
    *("dtype", "slots", "replication", "ranks_per_host", "load_format", "kernels"),
    *("max_model_len", "max_batch", "max_prefill_rows", "page_size", "num_pages", "deterministic"),
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What LLM takes, for every command that loads a model. Options left out keep LLM's own defaults."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo", metavar="DIR", help="'demo' or a model directory")
    group.add_argument("--hosts", type=_positive, default=1, metavar="N", help="hosts that share the experts")
    rest = {"metavar": "N", "type": _positive, "default": argparse.SUPPRESS}
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


def configure_generate(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--in-flight", type=_positive, default=256, metavar="N", help="requests in the engine at once")
    group.add_argument("--json", action="store_true", help="print a summary as one JSON object on stdout")


def run_generate(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    from moe_jax import batch
    from moe_jax.request import SamplingParams

    with _bad_input():
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
    with contextlib.ExitStack() as stack:

        def connect() -> batch.Engine:
            with _bad_input():
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


# -- convert --------------------------------------------------------------------------------------------------------


def configure_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face model directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the serving checkpoint goes")
    parser.add_argument("--json", action="store_true", help="print a summary as one JSON object on stdout")


def run_convert(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    started = time.monotonic()
    with _bad_input():
        from moe_jax import checkpoint
        from moe_jax.llm import model_directory

        checkpoint.convert(model_directory(args.model), args.output)
    seconds = round(time.monotonic() - started, 3)
    if args.json:
        print(json.dumps({"model": args.model, "output": args.output, "seconds": seconds}))
    else:
        print(f"{args.model} → {args.output} in {seconds} s", file=sys.stderr)
    return 0


# -- serve ----------------------------------------------------------------------------------------------------------

_ADDRESS = "127.0.0.1:50051"


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, found {text!r}")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a port, found {text!r}")
    return int(text)


def configure_serve(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--address", type=_address, default=_ADDRESS, metavar="HOST:PORT", help="port 0: any free one")
    group.add_argument(
        "--workers", choices=("local", "none"), default="local", help="none: they are started on other machines"
    )
    group.add_argument("--no-restart", action="store_true", help="leave it to others to start lost workers again")
    group.add_argument("--platform", choices=("cpu", "cuda"), help="of the workers (default: a GPU if there is one)")
    group.add_argument("--journal", type=Path, metavar="DIR", help="requests are kept there and outlive this process")
    group.add_argument("--log-dir", type=Path, metavar="DIR", help="a log of each local worker")
    group.add_argument("--openai-port", type=_port, metavar="PORT", help="OpenAI's HTTP interface, by the gateway smg")
    group.add_argument("--otlp", metavar="URL", help="send traces to this OpenTelemetry collector (gRPC)")
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="json: an object a line")
    group.add_argument("--web", type=_address, metavar="HOST:PORT", help="serve a status page and /metrics there")
    group.add_argument(
        "--rebalance-above",
        type=float,
        default=1.25,
        metavar="X",
        help="move experts when the most loaded rank has X times the mean load; 0: never by itself",
    )
    group.add_argument("--max-queue-tokens", type=_positive, metavar="N", help="of all requests that are accepted")
    group.add_argument(
        "--max-queue-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="that a request may have to wait for its turn",
    )
    group.add_argument("--max-output-tokens", type=_positive, metavar="N", help="that one request may ask for")
    group.add_argument(
        "--grace", type=float, default=20.0, metavar="S", help="seconds for accepted requests to finish after SIGTERM"
    )
    add_server(parser)
    add_model_options(parser)


def run_serve(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    """Prints one line when requests are served; ends when SIGTERM or SIGINT comes, with exit code 0."""
    import asyncio
    import logging
    import os

    from moe_jax.llm import model_directory
    from serving.credentials import server_credentials
    from serving.environment import guess_platform
    from serving.options import Options

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.INFO)
    given = llm_options(args)
    own = {name: given.pop(name) for name in ("hosts", "ranks_per_host", "load_format") if name in given}
    with _bad_input():
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


# -- worker ---------------------------------------------------------------------------------------------------------


def configure_worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--coordinator", type=_address, required=True, metavar="HOST:PORT", help="where it listens")
    parser.add_argument("--rank", type=_natural, required=True, metavar="R", help="this worker's number, from 0")
    parser.add_argument("--host", required=True, metavar="NAME", help="label of the failure domain it belongs to")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--gpu", type=_natural, metavar="I", help="which visible GPU (default: that of the rank)")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help="seconds to go on uncoordinated")
    parser.add_argument(
        "--grace", type=float, default=20.0, metavar="S", help="seconds for its requests to move away after SIGTERM"
    )
    add_credentials(parser)


def run_worker(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    """Exit codes as in serving.worker: 75 says that the coordinator has dismissed it."""
    import asyncio
    import os

    from serving import worker
    from serving.credentials import credentials
    from serving.environment import guess_platform

    with _bad_input():
        platform = args.platform or guess_platform(os.environ.get("JAX_PLATFORMS"))
        given = credentials(args)
        options = worker.Options(
            args.coordinator, args.rank, args.host, platform, args.patience, args.grace, gpu=args.gpu, **given
        )
        return asyncio.run(worker.supervise(options))


# -- status, drain --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _admin(args: argparse.Namespace) -> Iterator[Any]:
    """The Admin service of a coordinator. What it refuses is bad input, what fails is a failure."""
    import grpc

    from serving.protos import inference_pb2_grpc as rpc

    address = args.address
    refusals = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
    with _channel(args) as channel:
        try:
            yield rpc.AdminStub(channel)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code, details = error.code(), error.details() or ""
            if code in refusals:
                raise UsageError(details) from None
            reason = f"{address}: {code.name}: {details}" if isinstance(code, grpc.StatusCode) else str(error)
            raise Failure(reason) from None


def _channel(args: argparse.Namespace) -> Any:
    import grpc

    from serving.access import with_key
    from serving.credentials import api_key, client_tls

    with _bad_input():
        tls, key = client_tls(args), api_key(args)
    options = [("grpc.enable_http_proxy", 0)]
    if tls is None:
        channel = grpc.insecure_channel(args.address, options=options)
    else:
        channel = grpc.secure_channel(args.address, tls.channel_credentials(), options=options)
    return channel if key is None else grpc.intercept_channel(channel, with_key(key))


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", type=_address, default=_ADDRESS, metavar="HOST:PORT", help="of the coordinator")
    add_client(parser)


def configure_status(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--slots", action="store_true", help="with --json: also what each slot holds")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="write the experts' load there, for moe-jax plan --load"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_status(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        wanted = pb.StatusRequest(slots=args.slots, load=args.load is not None)
        status = json.loads(admin.Status(wanted, timeout=20.0).json)
    if args.load is not None:
        load = status.pop("load")
        if not load:
            raise Failure("--load: no tokens have been counted yet: try again once requests have been served")
        with _bad_input():
            args.load.write_text(json.dumps({"load": load}))
    if args.json:
        print(json.dumps(status))
    else:
        _print_status(status)
    return 0


def _print_status(status: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    reason = f" ({status['reason']})" if status.get("reason") else ""
    console.print(f"{status['state']}{reason}, epoch {status['epoch']}", markup=False)
    if status["experts"] is not None:
        console.print(
            "{logical} experts in {slots} slots a layer, {missing} missing, at least {min_replicas} replicas; "
            "{survivable_host_losses} lost hosts are survivable".format(**status["experts"])
            + f", {status['survivable_without_compiling']} without compiling; "
            + ("load not known yet" if (x := status["experts"]["imbalance"]) is None else f"imbalance {x:.3f}")
        )
    narrow: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 1, 0, 0)}
    ranks = Table("rank", "host", "state", "pid", "device", **narrow)
    for rank in status["ranks"]:
        ranks.add_row(*("–" if rank[name] is None else str(rank[name]) for name in (c.header for c in ranks.columns)))
    console.print(ranks)
    phases = ("detect", "fence", "agree", "load", "compile", "rebuild", "resume", "pause")
    changes = Table("epoch", "lost", "joined", *phases, **narrow)
    for change in status["recoveries"][-8:]:
        times = (change[f"{phase}_ms"] for phase in phases)
        changed = (" ".join(map(str, change[name])) or "–" for name in ("lost", "joined"))
        changes.add_row(str(change["epoch"]), *changed, *("–" if ms is None else f"{ms:.0f}" for ms in times))
    if status["recoveries"]:
        console.print("\nchanges of the ranks that serve, in ms:", changes, sep="\n")


def configure_health(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--timeout", type=float, default=4.0, metavar="S", help="seconds to wait for an answer")


def run_health(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    """0 while new requests are served, else 1: for probes where TLS is in their way."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest(service="moe_jax.v1.Inference")
    with _channel(args) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=args.timeout)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise Failure(f"{args.address}: {error.code()}: {error.details()}") from None
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(name)
    return 0 if name == "SERVING" else 1


def configure_top(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--every", type=float, default=0.5, metavar="S", help="seconds between two looks")
    parser.add_argument("--looks", type=_positive, metavar="N", help="end after so many")


def run_top(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    from serving import top
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        top.show(
            lambda: json.loads(admin.Status(pb.StatusRequest(slots=True), timeout=10.0).json), args.every, args.looks
        )
    return 0


def configure_drain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST", help="label of the host that shall leave")
    _add_coordinator(parser)
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for it to have left")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_drain(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        left = admin.Drain(pb.DrainRequest(host=args.host), timeout=args.timeout)
    _print_host(args, left, "left")
    return 0


def configure_undrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST", help="label of the host that was drained")
    _add_coordinator(parser)
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds to wait for it to serve")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_undrain(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        back = admin.Undrain(pb.UndrainRequest(host=args.host), timeout=args.timeout)
    _print_host(args, back, "serve")
    return 0


def _print_host(args: argparse.Namespace, answer: Any, what: str) -> None:
    """answer: has `ranks` and `epoch`. what: these ranks do now, or did."""
    ranks = list(answer.ranks)
    if args.json:
        print(json.dumps({"host": args.host, "ranks": ranks, "epoch": answer.epoch}))
    else:
        named = " ".join(["ranks", *map(str, ranks)]) if ranks else "no ranks"
        print(f"{args.host}: {named} {what}; the cluster is in epoch {answer.epoch}")


# -- key ------------------------------------------------------------------------------------------------------------


def configure_rebalance(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_rebalance(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    """Returns once the last weights are in place."""
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        done = admin.Rebalance(pb.RebalanceRequest())
    if args.json:
        print(json.dumps({"slots": done.slots, "epoch": done.epoch}))
    else:
        print(f"{done.slots} slots hold another expert now, in epoch {done.epoch}")
    return 0


def configure_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of whoever is to use it")
    parser.add_argument("--admin", action="store_true", help="it may also drain hosts and the like")


def run_key(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    """The key goes to stdout, once; what the file of keys has of it to stderr."""
    from serving.access import draw_key

    key, digest = draw_key()
    print(key)
    print(f'\nfor the file of --api-keys:\n\n[{json.dumps(args.name)}]\nsha256 = "{digest}"', file=sys.stderr)
    if args.admin:
        print("admin = true", file=sys.stderr)
    return 0


# -- plan -----------------------------------------------------------------------------------------------------------


def run_plan(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    with _bad_input():
        return plan_command.run(args)


# -- warmup ---------------------------------------------------------------------------------------------------------


def configure_warmup(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    warmup_command.configure(parser)


def run_warmup(args: argparse.Namespace, llm_factory: LLMFactory) -> int:
    try:
        with _bad_input():
            return warmup_command.run(args, llm_options(args))
    except (RuntimeError, TimeoutError) as error:
        raise Failure(str(error)) from error


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, found {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


_natural.__name__ = _positive.__name__ = "integer"  # argparse names the type: "invalid integer value: 'x'"

COMMANDS: tuple[Command, ...] = (
    Command("generate", "Generate for a file of prompts.", configure_generate, run_generate),
    Command("serve", "Serve a model over gRPC: a coordinator and its workers.", configure_serve, run_serve),
    Command("worker", "Run one rank of a cluster whose coordinator is elsewhere.", configure_worker, run_worker),
    Command("status", "Show what a cluster is doing.", configure_status, run_status),
    Command("top", "Show what a cluster is doing, live.", configure_top, run_top),
    Command("health", "Say whether new requests are served.", configure_health, run_health),
    Command("drain", "Move a host's requests to others and let it leave.", configure_drain, run_drain),
    Command("undrain", "Take a drained host back, whose workers the server starts.", configure_undrain, run_undrain),
    Command("rebalance", "Move experts to where their load is even.", configure_rebalance, run_rebalance),
    Command("key", "Draw an API key.", configure_key, run_key),
    Command("plan", "Place experts, and say what the placement survives.", plan_command.configure, run_plan),
    Command("warmup", "Compile what a cluster and its losses need.", configure_warmup, run_warmup),
    Command("convert", "Write a serving checkpoint of a model.", configure_convert, run_convert),
)

if __name__ == "__main__":
    sys.exit(main())
