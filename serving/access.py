"""Who may call what: API keys for clients and operators, one token for the workers of a cluster.

A call is judged by its metadata, before anything of its message is parsed. Health is everybody's; with keys all else
of the public services needs one, reflection included, and Admin one of an administrator. Workers need the cluster's
token if there is one. Keys are drawn at random and long, so what is kept of one is its plain SHA-256.

The file of keys is TOML, a table for each name:

    [alice]
    sha256 = "…"           # `moe-jax key alice` draws a key and prints this
    admin = false          # may drain, watch, …
    max_requests = 256     # open at once
    max_tokens = 1048576   # of prompts, open at once
    weight = 1.0           # share of the cluster when it is short
    max_priority = 0       # of a request, at most 9
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc

from serving.admission import MAX_PRIORITY

KEY_VARIABLE = "MOE_JAX_API_KEY"
TOKEN_VARIABLE = "MOE_JAX_CLUSTER_TOKEN"
TOKEN_HEADER = "x-moe-jax-cluster-token"
_OPEN = ("/grpc.health.v1.Health/",)
_CLUSTER = "/moe_jax.v1.Cluster/"
_ADMIN = "/moe_jax.v1.Admin/"

audit = logging.getLogger("moe_jax.audit")


@dataclass(frozen=True)
class Key:
    """One caller. Raises ValueError for values that cannot work."""

    name: str
    sha256: str = ""
    admin: bool = False
    max_requests: int = 1 << 12
    max_tokens: int = 1 << 22
    weight: float = 1.0
    max_priority: int = 0

    def __post_init__(self) -> None:
        if self.max_priority not in range(MAX_PRIORITY + 1):
            found = f"found {self.max_priority!r}, expected 0 to {MAX_PRIORITY}"
            raise ValueError(f"key {self.name}: max_priority: {found}")
        for name in ("max_requests", "max_tokens", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"key {self.name}: {name}: found {value!r}, expected a number above 0")
        if self.sha256 and (len(self.sha256) != 64 or set(self.sha256.lower()) - set("0123456789abcdef")):
            raise ValueError(f"key {self.name}: sha256: found {self.sha256!r}, expected 64 hexadecimal digits")


ANYBODY = Key("", admin=True, max_priority=MAX_PRIORITY)  # where no keys are asked for
_caller: ContextVar[Key] = ContextVar("caller", default=ANYBODY)


_trace_parent: ContextVar[str | None] = ContextVar("trace_parent", default=None)


def trace_parent() -> str | None:
    """`traceparent` of the call that is being served."""
    return _trace_parent.get()


def caller() -> Key:
    """Of the call that is being served."""
    return _caller.get()


def draw_key() -> tuple[str, str]:
    """(a new key, what is to be kept of it)."""
    key = f"mj-{secrets.token_urlsafe(32)}"
    return key, digest(key)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Raises ValueError for a file that holds something else."""
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: found no TOML ({e})") from None
    known = {field.name for field in fields(Key)} - {"name"}
    keys = []
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) - known or "sha256" not in table:
            raise ValueError(f"{path}: [{name}]: expected sha256, and beside it only {', '.join(sorted(known))}")
        keys.append(Key(name, **table))
    if not keys:
        raise ValueError(f"{path}: found no keys, expected at least one")
    return tuple(keys)


def read_secret(path: Path) -> str:
    """One line. Raises ValueError for less than 16 characters."""
    text = path.read_text().strip()
    if len(text) < 16:
        raise ValueError(f"{path}: found {len(text)} characters, expected a secret of at least 16")
    return text


class Guard(grpc.aio.ServerInterceptor):
    """keys: None: no client needs one. token: of the cluster; None: whoever reaches the port may be a worker."""

    def __init__(self, keys: tuple[Key, ...] | None = None, token: str | None = None) -> None:
        self._keys, self._token = keys, token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        details: Any = handler_call_details
        method: str = details.method
        metadata: Mapping[str, str | bytes] = dict(details.invocation_metadata)
        if method.startswith(_CLUSTER):
            if self._token is not None and not _same(metadata.get(TOKEN_HEADER, ""), self._token):
                audit.warning("a worker without the cluster's token was refused", extra={"method": method})
                return _refuse(grpc.StatusCode.UNAUTHENTICATED, "a worker needs the cluster's token: --cluster-token")
        elif self._keys is not None and not method.startswith(_OPEN):
            key = self._find(metadata.get("authorization", ""))
            if key is None:
                text = "found no known API key, expected metadata 'authorization: Bearer …'"
                return _refuse(grpc.StatusCode.UNAUTHENTICATED, text)
            if method.startswith(_ADMIN) and not key.admin:
                audit.warning("refused", extra={"method": method, "key": key.name})
                return _refuse(grpc.StatusCode.PERMISSION_DENIED, f"key {key.name!r} is no administrator's")
            _caller.set(key)
        parent = metadata.get("traceparent")
        if isinstance(parent, str):
            _trace_parent.set(parent[:64])
        return await continuation(handler_call_details)

    def knows(self, authorization: str) -> bool:
        """Whether who says this may read what is everybody's."""
        return self._keys is None or self._find(authorization) is not None

    def _find(self, authorization: str | bytes) -> Key | None:
        """All are compared, so that the time it takes says nothing."""
        text = authorization.decode(errors="replace") if isinstance(authorization, bytes) else authorization
        kind, _, given = text.partition(" ")
        found, sum_of_it = None, digest(given.strip())
        for key in self._keys or ():
            if hmac.compare_digest(sum_of_it, key.sha256.lower()) and kind.lower() == "bearer":
                found = key
        return found


def _same(given: str | bytes, expected: str) -> bool:
    given = given if isinstance(given, bytes) else given.encode(errors="replace")
    return hmac.compare_digest(given, expected.encode())


def _refuse(code: grpc.StatusCode, details: str) -> grpc.RpcMethodHandler:
    """A handler for any kind of call that reads nothing."""

    async def abort(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, details)

    return grpc.stream_stream_rpc_method_handler(abort)  # type: ignore[arg-type]


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    def __init__(self, key: str) -> None:
        self._key = key

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {self._key}")]
        return continuation(_Details(details.method, details.timeout, metadata, details.credentials), request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._intercept(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._intercept(continuation, client_call_details, request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._intercept(continuation, client_call_details, request_iterator)


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None = None
    compression: Any = None


def with_key(key: str) -> Any:
    """For grpc.intercept_channel: says a client's key with each call."""
    return _WithKey(key)
