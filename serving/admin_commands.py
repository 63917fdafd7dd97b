"""`moe-jax status`, `top`, `health`, `drain`, `undrain` and `rebalance`: what an operator asks of a coordinator."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.command import DEFAULT_ADDRESS, Failure, UsageError, address, bad_input, positive
from serving.credentials import add_client, api_key, client_tls


def _add_coordinator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", type=address, default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="of the coordinator"
    )
    add_client(parser)


@contextlib.contextmanager
def _admin(args: argparse.Namespace) -> Iterator[Any]:
    """The Admin service of a coordinator. What it refuses is bad input, what fails is a failure."""
    import grpc

    from serving.protos import inference_pb2_grpc as rpc

    refusals = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
    with _channel(args) as channel:
        try:
            yield rpc.AdminStub(channel)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code, details = error.code(), error.details() or ""
            if code in refusals:
                raise UsageError(details) from None
            reason = f"{args.address}: {code.name}: {details}" if isinstance(code, grpc.StatusCode) else str(error)
            raise Failure(reason) from None


def _channel(args: argparse.Namespace) -> Any:
    import grpc

    from serving.access import with_key

    with bad_input():
        tls, key = client_tls(args), api_key(args)
    options = [("grpc.enable_http_proxy", 0)]
    if tls is None:
        channel = grpc.insecure_channel(args.address, options=options)
    else:
        channel = grpc.secure_channel(args.address, tls.channel_credentials(), options=options)
    return channel if key is None else grpc.intercept_channel(channel, with_key(key))


def configure_status(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--slots", action="store_true", help="with --json: also what each slot holds")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="write the experts' load there, for moe-jax plan --load"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_status(args: argparse.Namespace) -> int:
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        wanted = pb.StatusRequest(slots=args.slots, load=args.load is not None)
        status = json.loads(admin.Status(wanted, timeout=20.0).json)
    if args.load is not None:
        load = status.pop("load")
        if not load:
            raise Failure("--load: no tokens have been counted yet: try again once requests have been served")
        with bad_input():
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


def configure_top(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--every", type=float, default=0.5, metavar="S", help="seconds between two looks")
    parser.add_argument("--looks", type=positive, metavar="N", help="end after so many")


def run_top(args: argparse.Namespace) -> int:
    from serving import top
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        top.show(
            lambda: json.loads(admin.Status(pb.StatusRequest(slots=True), timeout=10.0).json), args.every, args.looks
        )
    return 0


def configure_health(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--timeout", type=float, default=4.0, metavar="S", help="seconds to wait for an answer")


def run_health(args: argparse.Namespace) -> int:
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


def _add_host(parser: argparse.ArgumentParser, host: str, timeout: float, until: str) -> None:
    parser.add_argument("host", metavar="HOST", help=f"label of the host that {host}")
    _add_coordinator(parser)
    parser.add_argument(
        "--timeout", type=float, default=timeout, metavar="S", help=f"seconds to wait for it to {until}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def configure_drain(parser: argparse.ArgumentParser) -> None:
    _add_host(parser, "shall leave", 120.0, "have left")


def run_drain(args: argparse.Namespace) -> int:
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        left = admin.Drain(pb.DrainRequest(host=args.host), timeout=args.timeout)
    _print_host(args, left, "left")
    return 0


def configure_undrain(parser: argparse.ArgumentParser) -> None:
    _add_host(parser, "was drained", 300.0, "serve")


def run_undrain(args: argparse.Namespace) -> int:
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


def configure_rebalance(parser: argparse.ArgumentParser) -> None:
    _add_coordinator(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run_rebalance(args: argparse.Namespace) -> int:
    """Returns once the last weights are in place."""
    from serving.protos import inference_pb2 as pb

    with _admin(args) as admin:
        done = admin.Rebalance(pb.RebalanceRequest())
    if args.json:
        print(json.dumps({"slots": done.slots, "epoch": done.epoch}))
    else:
        print(f"{done.slots} slots hold another expert now, in epoch {done.epoch}")
    return 0
