"""Certificates, for gRPC and for the connections beside it.

With a certificate a server speaks TLS only; with an authority it may ask its clients for theirs (mTLS), and a client
checks whom it reached. Files are PEM. gRPC reads a server's files again for each new connection once they change, so
certificates can be renewed in place.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc


@dataclass(frozen=True)
class Tls:
    """One end. Raises ValueError for files that do not belong together."""

    cert: Path | None = None  # own certificate, with what lies between it and its authority
    key: Path | None = None
    ca: Path | None = None  # authorities that the other end's certificate may come from
    mutual: bool = False  # a server's: clients must have a certificate, too

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: found only one of certificate and key, expected both or neither")
        if self.mutual and (self.cert is None or self.ca is None):
            raise ValueError("mtls: found no certificate or no authority, expected --tls-cert, --tls-key and --tls-ca")
        for path in (self.cert, self.key, self.ca):
            if path is not None and not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
        if self.cert is not None:
            try:
                self.server_context()
            except ssl.SSLError as e:
                raise ValueError(f"{self.cert}, {self.key}: no certificate with its key ({e.reason or e})") from None

    @property
    def serves(self) -> bool:
        return self.cert is not None

    def server_credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), _Renewed(self).configuration, require_client_authentication=self.mutual
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))

    def server_context(self) -> ssl.SSLContext:
        assert self.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        if self.mutual:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context

    def stamp(self) -> tuple[float, ...]:
        """Changes when a file does."""
        return tuple(path.stat().st_mtime for path in (self.cert, self.key, self.ca) if path is not None)

    def _configuration(self) -> Any:
        pair: Any = (_read(self.key), _read(self.cert))
        return grpc.ssl_server_certificate_configuration([pair], _read(self.ca))


class _Renewed:
    def __init__(self, tls: Tls) -> None:
        self._tls, self._stamp = tls, tls.stamp()

    def configuration(self) -> Any:
        """None while nothing has changed. While files are being replaced, the old ones are good enough."""
        try:
            stamp = self._tls.stamp()
            if stamp == self._stamp:
                return None
            self._tls.server_context()
            configuration = self._tls._configuration()
        except (OSError, ssl.SSLError):
            return None
        self._stamp = stamp
        return configuration


class Stream:
    """A TLS connection of which one thread reads while another writes; OpenSSL itself allows neither at once."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        sock.setblocking(False)
        self._socket, self._lock = sock, threading.Lock()

    def recv(self, size: int) -> bytes:
        return self._try(lambda: self._socket.recv(size))

    def sendall(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            data = data[self._try(lambda rest=data: self._socket.send(rest)) :]

    def shutdown(self, how: int) -> None:
        socket.socket.shutdown(self._socket, how)  # of the socket below: whoever waits is woken

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try(self, attempt: Any) -> Any:
        while True:
            try:
                with self._lock:
                    return attempt()
            except ssl.SSLWantReadError:
                select.select([self._socket], [], [])
            except ssl.SSLWantWriteError:
                select.select([], [self._socket], [])


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
