"""Who is let in: certificates, keys, tokens, over real connections."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import trustme

from serving.access import TOKEN_HEADER, Key, digest, draw_key, read_keys, read_secret, with_key
from serving.cli import main
from serving.protos import cluster_pb2, cluster_pb2_grpc
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc
from serving.tls import Tls
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.test_api import PATIENT, Running, request

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TOKEN = "0123456789abcdef"


class Files:
    """An authority, and certificates of it for this machine; and one of another authority."""

    def __init__(self, directory: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.ca, self.cert, self.key = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.issue(authority)
        self.authority = authority
        other.cert_pem.write_to_path(str(directory / "other.pem"))
        self.stranger = other.issue_cert("127.0.0.1")
        self.other_cert, self.other_key = directory / "other-cert.pem", directory / "other-key.pem"
        self.stranger.private_key_pem.write_to_path(str(self.other_key))
        self.stranger.cert_chain_pems[0].write_to_path(str(self.other_cert))

    def issue(self, authority: trustme.CA) -> None:
        own = authority.issue_cert("127.0.0.1")
        own.private_key_pem.write_to_path(str(self.key))
        own.cert_chain_pems[0].write_to_path(str(self.cert))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


ALICE, BOB = draw_key()[0], draw_key()[0]
KEYS = (Key("alice", digest(ALICE)), Key("bob", digest(BOB), admin=True))


@pytest.fixture(scope="module")
def guarded(files: Files) -> Iterator[Running]:
    """mTLS, keys, a token: with workers that have all they need."""
    tls = Tls(files.cert, files.key, files.ca, mutual=True)
    cluster = fake_cluster(("a", "b"), fake={"step": 0.002}, **PATIENT)
    running = Running(cluster, tls=tls, keys=KEYS, token=TOKEN, client=Tls(files.cert, files.key, files.ca), key=BOB)
    yield running
    running.close()


@contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value  # type: ignore[attr-defined]
    assert text in (caught.value.details() or "")  # type: ignore[attr-defined]


def channel(running: Running, tls: Tls | None, key: str | None = None) -> grpc.Channel:
    own = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    plain = (
        grpc.insecure_channel(running.address, own)
        if tls is None
        else grpc.secure_channel(running.address, tls.channel_credentials(), own)
    )
    return plain if key is None else grpc.intercept_channel(plain, with_key(key))


def test_those_who_belong_are_served(guarded, files):
    tls = Tls(files.cert, files.key, files.ca)
    with channel(guarded, tls, ALICE) as c:
        assert list(rpc.InferenceStub(c).Complete(request(30)).token_ids) == tokens(1, 30)
        with refused(grpc.StatusCode.PERMISSION_DENIED, "'alice' is no administrator's"):
            rpc.AdminStub(c).Status(pb.StatusRequest())


@pytest.mark.parametrize("which", ["no TLS", "no certificate", "another authority's"])
def test_strangers_do_not_get_a_connection(guarded, files, which):
    given = {
        "no TLS": None,
        "no certificate": Tls(ca=files.ca),
        "another authority's": Tls(files.other_cert, files.other_key, files.ca),
    }[which]
    with channel(guarded, given, ALICE) as c, refused(grpc.StatusCode.UNAVAILABLE):
        rpc.InferenceStub(c).Complete(request(), timeout=5)


@pytest.mark.parametrize("key", [None, "wrong", "mj-", ALICE[:-1], "x" * 5000], ids=range(5))
def test_without_a_key_nothing_is_parsed(guarded, files, key):
    with channel(guarded, Tls(files.cert, files.key, files.ca), key) as c:
        expected = grpc.StatusCode.UNAUTHENTICATED
        for stub in (c.unary_unary, c.unary_stream):
            for method in ("Inference/Complete", "Inference/Generate", "Admin/Drain"):
                with refused(expected, "no known API key"):
                    answer = stub(f"/moe_jax.v1.{method}")(b"\xff\xff this is no message", timeout=5)
                    list(answer) if stub == c.unary_stream else None
        listing = c.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with refused(expected):
            next(listing(iter([b"\x3a\x00"]), timeout=5))


def test_a_worker_needs_the_token(guarded, files, caplog):
    hello = cluster_pb2.WorkerMessage(hello=cluster_pb2.Hello(rank=0, host="a", version="3"))
    with channel(guarded, Tls(files.cert, files.key, files.ca), BOB) as c:
        for token in (None, "0123456789abcdeX", ""):
            metadata = None if token is None else [(TOKEN_HEADER, token)]
            with refused(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token"):
                next(cluster_pb2_grpc.ClusterStub(c).Control(iter([hello]), metadata=metadata))
    assert all(rank["state"] == "live" for rank in guarded.status()["ranks"])
    assert "without the cluster's token" in caplog.text


def test_frames_are_encrypted_and_strangers_hold_nobody_up(guarded, files):
    """The port beside gRPC: no engine's key is ever sent in the clear, and what is no TLS is dropped."""
    port = guarded.call(lambda: guarded.server.coordinator._frames.port)

    async def probe() -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
        plain = b""
        with suppress(ConnectionResetError):
            plain = await reader.read()
        writer.close()
        context = Tls(files.cert, files.key, files.ca).client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(b"x" * 32)
        wrong = await reader.read()
        writer.close()
        with pytest.raises(ssl.SSLError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=Tls(ca=files.ca).client_context())
            await reader.read()
        return plain, wrong

    plain, wrong = asyncio.run(probe())
    assert b"HTTP" not in plain and wrong == b""
    with channel(guarded, Tls(files.cert, files.key, files.ca), ALICE) as c:
        assert list(rpc.InferenceStub(c).Complete(request(30)).token_ids) == tokens(1, 30)


def test_renewed_certificates_are_used(guarded, files):
    files.issue(files.authority)
    with channel(guarded, Tls(files.cert, files.key, files.ca), ALICE) as c:
        assert rpc.InferenceStub(c).Complete(request(5)).finish_reason == "length"


def test_admin_calls_are_logged(guarded, files, caplog):
    with caplog.at_level(logging.INFO, "moe_jax.audit"), refused(grpc.StatusCode.NOT_FOUND):
        guarded.admin.Drain(pb.DrainRequest(host="x"))
    (record,) = [r for r in caplog.records if r.name == "moe_jax.audit" and "Drain" in r.getMessage()]
    assert vars(record)["key"] == "bob" and vars(record)["outcome"] == "NOT_FOUND"


# Files and options


def test_keys(tmp_path):
    path = tmp_path / "keys.toml"
    key, kept = draw_key()
    assert hashlib.sha256(key.encode()).hexdigest() == kept and key not in kept and draw_key()[0] != key
    path.write_text(f'[alice]\nsha256 = "{kept}"\nweight = 2\n\n["bob b"]\nsha256 = "{kept}"\nadmin = true\n')
    alice, bob = read_keys(path)
    assert (alice.name, alice.weight, alice.admin, bob.name, bob.admin) == ("alice", 2, False, "bob b", True)
    for text, wrong in (
        ("", "no keys"),
        ("[a]\n", "expected sha256"),
        ("a = 1", "expected sha256"),
        ('[a]\nsha256 = "abc"', "64 hexadecimal digits"),
        (f'[a]\nsha256 = "{kept}"\nweight = 0', "above 0"),
        (f'[a]\nsha256 = "{kept}"\ncolour = 0', "only admin"),
        ("\0", "no TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            read_keys(path)
    path.write_text("short\n")
    with pytest.raises(ValueError, match="at least 16"):
        read_secret(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--address 0.0.0.0:1", "without TLS (--tls-cert, --tls-key), API keys (--api-keys); expected all"),
        ("--address 10.0.0.1:1 --workers none", "a token for workers (--cluster-token)"),
        ("--tls-cert CERT", "only one of certificate and key"),
        ("--tls-cert CERT --tls-key OTHER", "no certificate with its key"),
        ("--tls-cert CERT --tls-key KEY --mtls", "no authority"),
        ("--tls-cert nowhere --tls-key KEY", "nowhere: no such file"),
        ("--api-keys CERT", "no TOML"),
    ],
)
def test_what_serve_refuses(argv, message, files, capsys):
    for name, path in (("CERT", files.cert), ("KEY", files.key), ("OTHER", files.other_key)):
        argv = argv.replace(name, str(path))
    assert main(["serve", *argv.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and "Traceback" not in captured.err


def test_operators_from_the_command_line(guarded, files, tmp_path, capsys, monkeypatch):
    given = ["--address", guarded.address, "--tls-ca", str(files.ca)]
    assert main(["status", *given]) == 1 and "UNAVAILABLE" in capsys.readouterr().err
    given += ["--tls-cert", str(files.cert), "--tls-key", str(files.key)]
    assert main(["status", *given]) == 1 and "UNAUTHENTICATED" in capsys.readouterr().err
    (tmp_path / "key").write_text(BOB + "\n")
    assert main(["status", *given, "--api-key", str(tmp_path / "key")]) == 0
    monkeypatch.setenv("MOE_JAX_API_KEY", BOB)
    assert main(["status", *given]) == 0 and "SERVING" in capsys.readouterr().out
