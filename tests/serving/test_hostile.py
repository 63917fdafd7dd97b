"""Calls that no honest client makes: each gets the right status, and a stream beside them goes on as if they were not.

A few hundred by default; HOSTILE_CALLS=2500 makes as many of each of the four kinds, 10,000 in all.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.access import Key, digest
from serving.protos import cluster_pb2 as cluster_pb
from serving.protos import cluster_pb2_grpc as cluster_rpc
from serving.protos import inference_pb2 as pb
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.test_api import PATIENT, Running, request

CALLS = int(os.environ.get("HOSTILE_CALLS", "150"))
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120 + CALLS)]
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
many = settings(max_examples=CALLS, deadline=None, suppress_health_check=SLOW)

CODE = grpc.StatusCode
TYPES = {
    "Inference/Generate": pb.GenerateRequest,
    "Inference/Complete": pb.GenerateRequest,
    "Inference/Resume": pb.ResumeRequest,
    "Inference/Cancel": pb.CancelRequest,
    "Inference/Tokenize": pb.TokenizeRequest,
    "Inference/Detokenize": pb.DetokenizeRequest,
    "Inference/GetModel": pb.GetModelRequest,
    "Admin/Status": pb.StatusRequest,
    "Admin/Drain": pb.DrainRequest,
    "Admin/Undrain": pb.UndrainRequest,
}
STREAMS = ("Inference/Generate", "Inference/Resume")
REFUSED = {CODE.INVALID_ARGUMENT, CODE.NOT_FOUND, CODE.OUT_OF_RANGE, CODE.ALREADY_EXISTS, CODE.RESOURCE_EXHAUSTED}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """A server, and a stream that must not notice anything."""
    keys = (Key("root", digest("root"), admin=True, max_priority=9),)
    running = Running(fake_cluster(("a", "b"), fake={"step": 0.002}, **PATIENT), keys=keys, key="root")
    asked = request(16000, request_id="honest")
    call, seen = running.inference.Generate(asked), []
    reader = threading.Thread(target=lambda: seen.extend(t for r in call for t in r.token_ids))
    reader.start()
    pids = [rank["pid"] for rank in running.status()["ranks"]]
    yield running
    assert [rank["pid"] for rank in running.status()["ranks"]] == pids
    running.inference.Cancel(pb.CancelRequest(request_id="honest"))
    reader.join()
    assert seen == tokens(1, len(seen)) and len(seen) > 500
    running.no_requests()
    running.close()


def send(running: Running, method: str, data: bytes) -> grpc.StatusCode:
    """The status of a call with these bytes for a message. Longer answers are cut short."""
    path = f"/moe_jax.v1.{method}"
    try:
        if method in STREAMS:
            call = running.channel.unary_stream(path)(data, timeout=10)
            next(iter(call), None)
            call.cancel()
        else:
            running.channel.unary_unary(path)(data, timeout=10)
    except grpc.RpcError as e:
        return e.code()  # type: ignore[attr-defined]
    return CODE.OK


def parses(method: str, data: bytes) -> bool:
    try:
        TYPES[method].FromString(data)
    except DecodeError:
        return False
    return True


# Bytes


@many
@given(method=st.sampled_from(sorted(TYPES)), data=st.binary(max_size=200))
def test_random_bytes(served, method, data):
    code = send(served, method, data)
    assert (code in REFUSED | {CODE.OK}) if parses(method, data) else code == CODE.INVALID_ARGUMENT, (method, code)


@many
@given(method=st.sampled_from(sorted(TYPES)), data=st.data())
def test_true_messages_cut_or_changed(served, method, data):
    whole = bytearray(data.draw(messages(TYPES[method])).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    code = send(served, method, cut)
    assert (code in REFUSED | {CODE.OK}) if parses(method, cut) else code == CODE.INVALID_ARGUMENT, (method, code)


# Messages with every value that their types allow

INTEGERS = {
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
}
FLOATS = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, -1.0, 1e-45, 3e38, 0.0, 1.0])
)


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.type in INTEGERS:
        return INTEGERS[field.type]
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return FLOATS
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.one_of(st.text(max_size=300), st.sampled_from(["honest", "", "\0", "\ud7ff\U0010ffff", "x" * 5000]))
    return messages(field.message_type._concrete_class)


@st.composite
def messages(draw: Any, kind: type[Message]) -> Message:
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.is_repeated:
            items = draw(st.lists(values(field), max_size=20))
            getattr(message, field.name).extend(items)
        elif field.message_type:
            getattr(message, field.name).CopyFrom(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))
    return message


@many
@given(asked=messages(pb.GenerateRequest))
def test_any_request(served, asked):
    """What it is refused for is named; what is accepted gives no more than was asked for."""
    asked.request_id = asked.request_id if asked.request_id == "honest" else ""
    try:
        call = served.inference.Generate(asked, timeout=10)
        count = 0
        for response in call:
            count += len(response.token_ids)
            if count > 50:
                call.cancel()
                break
        assert count <= (asked.params.max_tokens if asked.params.HasField("max_tokens") else 16) or count > 50
        assert asked.params.temperature >= 0 and asked.WhichOneof("input") is not None
    except grpc.RpcError as e:
        assert e.code() in REFUSED, e  # type: ignore[attr-defined]
        if e.code() == CODE.INVALID_ARGUMENT:  # type: ignore[attr-defined]
            assert ": found" in e.details()  # type: ignore[attr-defined]


@many
@given(method=st.sampled_from(sorted(set(TYPES) - {"Inference/Generate"})), data=st.data())
def test_any_message(served, method, data):
    message = data.draw(messages(TYPES[method]))
    if getattr(message, "request_id", "") == "honest":
        message.ClearField("request_id")
    assert send(served, method, message.SerializeToString()) in REFUSED | {CODE.OK}


# By hand


def field(number: int, payload: bytes) -> bytes:
    """One of wire type 2."""
    size, header = len(payload), bytes([number << 3 | 2])
    while size > 127:
        header, size = header + bytes([size & 127 | 128]), size >> 7
    return header + bytes([size]) + payload


@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        ("Inference/Generate", field(2, b"\xff\xfe\xfa"), CODE.INVALID_ARGUMENT),  # no UTF-8
        ("Inference/Complete", field(2, b"\xed\xa0\x80"), CODE.INVALID_ARGUMENT),  # a surrogate
        ("Inference/Generate", field(3, b"\x0a\x05\xff\xff\xff\xff\x0f"), CODE.INVALID_ARGUMENT),  # token 2**32 - 1
        ("Inference/Generate", field(15, b"unknown"), CODE.INVALID_ARGUMENT),  # no prompt beside it
        ("Inference/Complete", field(2, b"1a ") + field(15, b"unknown" * 100), CODE.OK),
        ("Inference/Generate", b"\x22\xff\xff\xff\xff\x0f", CODE.INVALID_ARGUMENT),  # 4 GiB, it says
        ("Inference/Generate", field(2, b"x" * (5 << 20)), CODE.RESOURCE_EXHAUSTED),
        ("Inference/Generate", field(4, b"\x08\x01") * 10000 + field(2, b"1 "), CODE.OK),  # once more, and again
        ("Inference/Generate", b"\x23" * 10000, CODE.INVALID_ARGUMENT),  # groups in groups
        ("Inference/Resume", field(1, b"nobody's"), CODE.NOT_FOUND),
        ("Inference/Resume", field(1, b"honest") + b"\x10\xff\xff\xff\xff\x0f", CODE.OUT_OF_RANGE),
        ("Admin/Drain", field(1, b"../../etc/passwd\0"), CODE.NOT_FOUND),
        ("Admin/Destroy", b"", CODE.UNIMPLEMENTED),
    ],
)
def test_by_hand(served, method, data, code):
    assert send(served, method, data) == code


def test_what_is_no_worker(served):
    """Messages on the control stream of a worker, in any order."""
    stub = cluster_rpc.ClusterStub(served.channel)
    beat = cluster_pb.WorkerMessage(heartbeat=cluster_pb.Heartbeat(engine_stopped=True))
    hello = cluster_pb.WorkerMessage(hello=cluster_pb.Hello(rank=2**32 - 1, host="x" * 10000, version="3"))
    for said in ([], [beat], [cluster_pb.WorkerMessage()], [hello, hello, beat]):
        try:
            for answer in stub.Control(iter(said), timeout=5):
                assert answer.WhichOneof("kind") in ("welcome", "dismiss")
        except grpc.RpcError as e:
            assert e.code() == CODE.INVALID_ARGUMENT, e  # type: ignore[attr-defined]
    raw = served.channel.stream_stream("/moe_jax.v1.Cluster/Control")
    with pytest.raises(grpc.RpcError):
        next(raw(iter([b"\xff\xff"]), timeout=5))
    assert all(rank["state"] == "live" for rank in served.status()["ranks"])


def test_many_calls_that_are_dropped_at_once(served):
    for i in range(min(CALLS, 1000)):
        call = served.inference.Generate(request(5000, seed=i))
        call.cancel()
    honest = served.inference.Complete(request(5))
    assert list(honest.token_ids) == tokens(1, 5)
