"""Options of the command line by which servers, workers and operators say who they are."""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
from pathlib import Path
from typing import Any

from serving.access import KEY_VARIABLE, TOKEN_VARIABLE, read_secret
from serving.tls import Tls


def add_tls(group: Any, whose: str) -> None:
    """group: of an argparse parser. whose: certificate it checks."""
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help=f"authority of {whose} certificate, PEM")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="own certificate, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")


def add_credentials(parser: argparse.ArgumentParser) -> None:
    """What a worker shows to be admitted."""
    group = parser.add_argument_group("credentials")
    add_tls(group, "the coordinator's")
    group.add_argument(
        "--cluster-token", type=Path, metavar="FILE", help=f"the cluster's secret (default: ${TOKEN_VARIABLE}, if set)"
    )


def credentials(args: argparse.Namespace) -> dict[str, Any]:
    """As options of a worker. Raises ValueError and OSError for files that are none."""
    return {"tls": client_tls(args), "token": _token(args)}


def client_tls(args: argparse.Namespace) -> Tls | None:
    given = (args.tls_cert, args.tls_key, args.tls_ca)
    return Tls(*given) if any(given) else None


def _token(args: argparse.Namespace) -> str | None:
    return read_secret(args.cluster_token) if args.cluster_token else os.environ.get(TOKEN_VARIABLE) or None


def add_client(parser: argparse.ArgumentParser) -> None:
    """What an operator shows."""
    group = parser.add_argument_group("credentials")
    add_tls(group, "the coordinator's")
    group.add_argument(
        "--api-key", type=Path, metavar="FILE", help=f"holds an API key (default: ${KEY_VARIABLE}, if set)"
    )


def api_key(args: argparse.Namespace) -> str | None:
    return read_secret(args.api_key) if args.api_key else os.environ.get(KEY_VARIABLE) or None


def add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    add_tls(group, "workers' and clients'")
    group.add_argument("--mtls", action="store_true", help="whoever connects must have a certificate of --tls-ca")
    group.add_argument("--api-keys", type=Path, metavar="FILE", help="clients need one of these keys (moe-jax key)")
    group.add_argument(
        "--cluster-token", type=Path, metavar="FILE", help=f"of all workers (default: ${TOKEN_VARIABLE}, or drawn)"
    )
    group.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine though there is no TLS, or no API keys"
    )


def server_credentials(args: argparse.Namespace, local_workers: bool) -> dict[str, Any]:
    """As serving.options.Options has them. Raises ValueError for what would leave the service open to a network."""
    tls = Tls(args.tls_cert, args.tls_key, args.tls_ca, args.mtls) if args.tls_cert or args.mtls else None
    token = _token(args)
    if not (all(is_loopback(a) for a in (args.address, args.web) if a) or args.insecure):
        missing = [
            name
            for name, given in (
                ("TLS (--tls-cert, --tls-key)", tls),
                ("API keys (--api-keys)", args.api_keys),
                ("a token for workers (--cluster-token)", token or local_workers),
            )
            if not given
        ]
        if missing:
            raise ValueError(
                f"address: found {args.address}, which other machines can reach, without {', '.join(missing)}; "
                f"expected all of these, a loopback address, or --insecure where the network itself is guarded"
            )
    if token is None and local_workers:
        token = secrets.token_hex(16)  # no other process may pose as one of them
    return {"tls": tls, "api_keys": args.api_keys, "cluster_token": token}


def is_loopback(address: str) -> bool:
    """Of "host:port"."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
