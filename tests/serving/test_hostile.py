"""Calls that no honest client makes: each gets the right status, and a stream beside them goes on as if they were not.

The server has all that guards it: mTLS, API keys, a token for workers. The honest stream is another key's than theirs.
A few hundred calls by default; HOSTILE_CALLS=1000 makes as many of each of the eleven kinds.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.access import TOKEN_HEADER, Key, digest
from serving.protos import cluster_pb2 as cluster_pb
from serving.protos import cluster_pb2_grpc as cluster_rpc
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc
from serving.protos import open_inference_pb2 as kserve
from serving.tls import Tls
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.hex_tokenizer import VOCABULARY
from tests.serving.test_api import PATIENT, Running, request
from tests.serving.test_security import TOKEN, Files, channel

CALLS = int(os.environ.get("HOSTILE_CALLS", "60"))
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120 + CALLS)]
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
many = settings(max_examples=CALLS, deadline=None, suppress_health_check=SLOW)

CODE = grpc.StatusCode
TYPES: dict[str, type[Message]] = {
    "moe_jax.v1.Inference/Generate": pb.GenerateRequest,
    "moe_jax.v1.Inference/Complete": pb.GenerateRequest,
    "moe_jax.v1.Inference/Resume": pb.ResumeRequest,
    "moe_jax.v1.Inference/Cancel": pb.CancelRequest,
    "moe_jax.v1.Inference/Tokenize": pb.TokenizeRequest,
    "moe_jax.v1.Inference/Detokenize": pb.DetokenizeRequest,
    "moe_jax.v1.Inference/GetModel": pb.GetModelRequest,
    "moe_jax.v1.Admin/Status": pb.StatusRequest,
    "moe_jax.v1.Admin/Watch": pb.WatchRequest,
    "moe_jax.v1.Admin/Drain": pb.DrainRequest,
    "moe_jax.v1.Admin/Undrain": pb.UndrainRequest,
    "inference.GRPCInferenceService/ModelMetadata": kserve.ModelMetadataRequest,
    "inference.GRPCInferenceService/ModelInfer": kserve.ModelInferRequest,
}
GENERATE, COMPLETE, RESUME = (f"moe_jax.v1.Inference/{name}" for name in ("Generate", "Complete", "Resume"))
STREAMS = (GENERATE, RESUME, "moe_jax.v1.Admin/Watch")
REFUSED = {CODE.INVALID_ARGUMENT, CODE.NOT_FOUND, CODE.OUT_OF_RANGE, CODE.ALREADY_EXISTS, CODE.RESOURCE_EXHAUSTED}
HONEST = 16000  # tokens of each of its outputs, which come one after the other
LONG = 500  # tokens that may take longer than a caller here waits


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def served(files: Files) -> Iterator[Running]:
    """A server, and a stream that must not notice anything."""
    keys = (Key("root", digest("root"), admin=True, max_priority=9), Key("alice", digest("alice")))
    client = Tls(files.cert, files.key, files.ca)
    running = Running(
        fake_cluster(("host-of-rank-0", "host-of-rank-1"), fake={"step": 0.002}, **PATIENT),
        prepare=lambda server: server.add_kserve_face("fake"),
        tls=Tls(files.cert, files.key, files.ca, mutual=True),
        client=client,
        keys=keys,
        token=TOKEN,
        key="root",
    )
    ended, outputs = threading.Event(), []

    def follow(stub: rpc.InferenceStub) -> None:
        for seed in itertools.count(1):
            outputs.append(seen := [])
            for response in stub.Generate(request(HONEST, seed, request_id="honest")):
                seen += response.token_ids
            if ended.is_set():
                return

    pids = [rank["pid"] for rank in running.status()["ranks"]]
    with channel(running, client, "alice") as alice:
        honest = rpc.InferenceStub(alice)
        reader = threading.Thread(target=follow, args=(honest,))
        reader.start()
        yield running
        ended.set()
        honest.Cancel(pb.CancelRequest(request_id="honest"))
        reader.join()
    assert [rank["pid"] for rank in running.status()["ranks"]] == pids
    for seed, seen in enumerate(outputs, 1):
        assert seen == tokens(seed, len(seen)) and (len(seen) == HONEST or seed == len(outputs))
    assert sum(map(len, outputs)) > 500
    running.no_requests()
    running.close()


def send(channel: grpc.Channel, method: str, data: bytes, timeout: float = 10.0) -> grpc.StatusCode:
    """The status of a call with these bytes for a message. Longer answers are cut short."""
    try:
        if method in STREAMS:
            call = channel.unary_stream(f"/{method}")(data, timeout=timeout)
            next(iter(call), None)
            call.cancel()
        else:
            channel.unary_unary(f"/{method}")(data, timeout=timeout)
    except grpc.RpcError as e:
        return e.code()  # type: ignore[attr-defined]
    return CODE.OK


def parses(method: str, data: bytes) -> bool:
    try:
        TYPES[method].FromString(data)
    except DecodeError:
        return False
    return True


def judge(running: Running, method: str, data: bytes) -> None:
    """Bytes that are no message are said to be none; what an honest client could have meant may take its time."""
    if not parses(method, data):
        assert send(running.channel, method, data) == CODE.INVALID_ARGUMENT, method
        return
    asked, right = TYPES[method].FromString(data), REFUSED | {CODE.OK}
    long = isinstance(asked, pb.GenerateRequest) and asked.params.max_tokens > LONG
    if long or isinstance(asked, kserve.ModelInferRequest):
        right |= {CODE.DEADLINE_EXCEEDED}
    code = send(running.channel, method, data, 2.0 if CODE.DEADLINE_EXCEEDED in right else 10.0)
    assert code in right, (method, code)


# Bytes


@many
@given(method=st.sampled_from(sorted(TYPES)), data=st.binary(max_size=200))
def test_random_bytes(served, method, data):
    judge(served, method, data)


@many
@given(method=st.sampled_from(sorted(TYPES)), data=st.data())
def test_true_messages_cut_or_changed(served, method, data):
    whole = bytearray(data.draw(messages(TYPES[method])).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    judge(served, method, bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def field(number: int, payload: bytes) -> bytes:
    """One of wire type 2."""
    return tag(number, 2) + varint(len(payload)) + payload


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


TEXTS = [  # fields of strings: those of GenerateRequest, of its parameters, and of others
    (GENERATE, lambda text: field(1, text) + field(2, b"1 ")),
    (COMPLETE, lambda text: field(2, text)),
    (GENERATE, lambda text: field(2, b"1 ") + field(4, field(6, text))),
    (RESUME, lambda text: field(1, text)),
    ("moe_jax.v1.Inference/Tokenize", lambda text: field(1, text)),
    ("moe_jax.v1.Admin/Drain", lambda text: field(1, text)),
    ("inference.GRPCInferenceService/ModelInfer", lambda text: field(1, text)),
]


@many
@given(st.sampled_from(TEXTS), st.binary(min_size=1, max_size=50).filter(lambda data: not is_text(data)))
def test_invalid_utf_8(served, place, data):
    method, message = place
    assert send(served.channel, method, message(data)) == CODE.INVALID_ARGUMENT


@st.composite
def unknown_fields(draw: Any) -> bytes:
    data = b""
    for number in draw(st.lists(st.integers(20, 2**29 - 1).filter(lambda n: not 19000 <= n < 20000), max_size=10)):
        match draw(st.sampled_from([0, 1, 2, 5])):
            case 0:
                data += tag(number, 0) + varint(draw(st.integers(0, 2**64 - 1)))
            case 1:
                data += tag(number, 1) + draw(st.binary(min_size=8, max_size=8))
            case 2:
                data += field(number, draw(st.binary(max_size=2000)))
            case 5:
                data += tag(number, 5) + draw(st.binary(min_size=4, max_size=4))
    return data


@many
@given(before=unknown_fields(), inside=unknown_fields(), after=unknown_fields())
def test_unknown_fields(served, before, inside, after):
    """They are overlooked, as protobuf has it."""
    asked = request(5)
    params = asked.params.SerializeToString() + inside
    asked.ClearField("params")
    data = before + asked.SerializeToString() + field(4, params) + after
    answer = served.channel.unary_unary(f"/{COMPLETE}")(data, timeout=10)
    assert list(pb.GenerateResponse.FromString(answer).token_ids) == tokens(1, 5)


@many
@given(
    st.sampled_from([(1, 300), (2, 1 << 18), (3, 1 << 18), (6, 1 << 14), (2, 5 << 20), (15, 5 << 20)]),
    st.integers(0, 1 << 16),
)
def test_huge_fields(served, place, more):
    """A request id, a prompt, token ids, a stop string; and messages beyond the bound of all."""
    number, least = place
    payload = b"1" * (least + more)
    data = field(4, field(6, payload)) if number == 6 else field(number, field(1, payload) if number == 3 else payload)
    data += b"" if number in (2, 3) else field(2, b"1 ")
    right = CODE.RESOURCE_EXHAUSTED if len(data) > 4 << 20 else CODE.INVALID_ARGUMENT
    assert send(served.channel, GENERATE, data) == right


# Messages with every value that their types allow

INTEGERS = {
    FieldDescriptor.TYPE_UINT32: st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
}
ODD = [math.nan, math.inf, -math.inf, -0.0, -1.0, 1e-45, 3e38, 0.0, 1.0]
FLOATS = st.one_of(st.floats(width=32), st.sampled_from(ODD))
WORDS = ["honest", "", "\0", "\ud7ff\U0010ffff", "x" * 5000, "fake", "text_input", "BYTES", "max_tokens", "temperature"]


def values(field: Any) -> st.SearchStrategy[Any]:
    if field.type in INTEGERS:
        return INTEGERS[field.type]
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return FLOATS
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.one_of(st.text(max_size=300), st.sampled_from(WORDS))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.one_of(st.binary(max_size=300), st.just(b"\x03\0\0\0abc"))
    return messages(field.message_type._concrete_class)


@st.composite
def messages(draw: Any, kind: type[Message]) -> Message:
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
            for name, item in draw(st.dictionaries(values(key), values(value), max_size=5)).items():
                getattr(message, field.name)[name].CopyFrom(item)
        elif field.is_repeated:
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
        assert asked.request_id != "honest"
    except grpc.RpcError as e:
        assert e.code() in REFUSED, e  # type: ignore[attr-defined]
        if e.code() == CODE.INVALID_ARGUMENT:  # type: ignore[attr-defined]
            assert ": found" in e.details()  # type: ignore[attr-defined]


@many
@given(method=st.sampled_from(sorted(set(TYPES) - {GENERATE})), data=st.data())
def test_any_message(served, method, data):
    judge(served, method, data.draw(messages(TYPES[method])).SerializeToString())


NEGATIVE = st.one_of(
    st.floats(max_value=0, exclude_max=True, width=32).filter(bool), st.sampled_from([math.nan, math.inf, -math.inf])
)
WRONG = st.one_of(
    st.tuples(st.just("temperature"), NEGATIVE),
    st.tuples(st.just("top_p"), st.one_of(NEGATIVE, st.floats(1.0, exclude_min=True, width=32), st.just(0.0))),
    st.tuples(st.just("max_tokens"), st.sampled_from([0, 2**32 - 1])),
    st.tuples(st.just("logprobs"), st.integers(100, 2**32 - 1)),
)


@many
@given(wrong=WRONG, method=st.sampled_from([GENERATE, COMPLETE]))
def test_negative_and_nan_parameters(served, wrong, method):
    name, value = wrong
    asked = request(5, params={name: value} | ({} if name == "max_tokens" else {"max_tokens": 5}))
    with pytest.raises(grpc.RpcError) as caught:
        stub = served.inference
        list(stub.Generate(asked, timeout=10)) if method == GENERATE else stub.Complete(asked, timeout=10)
    assert caught.value.code() == CODE.INVALID_ARGUMENT and name in caught.value.details()  # type: ignore[attr-defined]


@many
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=20), st.integers(VOCABULARY, 2**32 - 1), st.randoms())
def test_token_ids_out_of_range(served, ids, wrong, random):
    ids = [*ids, wrong]
    random.shuffle(ids)
    tokens = pb.TokenIds(ids=ids)
    for asked in (pb.GenerateRequest(token_ids=tokens), pb.DetokenizeRequest(token_ids=ids)):
        with pytest.raises(grpc.RpcError) as caught:
            stub = served.inference
            (stub.Complete if isinstance(asked, pb.GenerateRequest) else stub.Detokenize)(asked, timeout=10)
        assert caught.value.code() == CODE.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert f"token_ids[{ids.index(wrong)}]: found {wrong}" in caught.value.details()  # type: ignore[attr-defined]


# Strangers

EVERY = [*TYPES, "moe_jax.v1.Admin/Rebalance", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
HEADERS = st.one_of(
    st.none(),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200).filter(str.isprintable),
    st.sampled_from(["Bearer", "Bearer ", "Bearer Root", "Basic root", "Bearer root root", "bearer-root", "root"]),
)


@pytest.fixture(scope="module")
def keyless(served: Running, files: Files) -> Iterator[grpc.Channel]:
    with channel(served, Tls(files.cert, files.key, files.ca)) as one:
        yield one


@many
@given(method=st.sampled_from(EVERY), header=HEADERS, data=st.binary(max_size=50))
def test_no_auth(keyless, method, header, data):
    """Whatever is asked: nothing of it is looked at."""
    metadata = [] if header is None else [("authorization", header)]
    with pytest.raises(grpc.RpcError) as caught:
        list(keyless.stream_stream(f"/{method}")(iter([data]), timeout=10, metadata=metadata))
    assert caught.value.code() == CODE.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def wrong_certificates(files: Files, tmp_path_factory: pytest.TempPathFactory) -> list[Tls | None]:
    directory = tmp_path_factory.mktemp("wrong")

    def issue(name: str, authority: trustme.CA, **given: Any) -> Tls:
        issued = authority.issue_cert("127.0.0.1", **given)
        cert, key = directory / f"{name}.pem", directory / f"{name}-key.pem"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return Tls(cert, key, files.ca)

    past, other = datetime.datetime(2020, 1, 1), trustme.CA()
    return [
        None,  # plain text
        Tls(ca=files.ca),  # none of its own
        issue("stranger", other),
        issue("between", other.create_child_ca()),
        issue("expired", files.authority, not_before=past, not_after=past + datetime.timedelta(days=9)),
        issue(
            "future", files.authority, not_before=datetime.datetime(2090, 1, 1), not_after=datetime.datetime(2099, 1, 1)
        ),
        Tls(files.cert, files.key, directory / "stranger.pem"),  # takes this server for a stranger
    ]


@many
@given(which=st.integers(0, 6), method=st.sampled_from(EVERY), data=st.binary(max_size=50))
def test_wrong_certificates(served, wrong_certificates, which, method, data):
    """No connection at all, though the key is right."""
    with channel(served, wrong_certificates[which], "root") as one:
        assert send(one, method, data, timeout=20) == CODE.UNAVAILABLE


# By hand


@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        (GENERATE, field(2, b"\xff\xfe\xfa"), CODE.INVALID_ARGUMENT),  # no UTF-8
        (COMPLETE, field(2, b"\xed\xa0\x80"), CODE.INVALID_ARGUMENT),  # a surrogate
        (GENERATE, field(3, b"\x0a\x05\xff\xff\xff\xff\x0f"), CODE.INVALID_ARGUMENT),  # token 2**32 - 1
        (GENERATE, field(15, b"unknown"), CODE.INVALID_ARGUMENT),  # no prompt beside it
        (COMPLETE, field(2, b"1a ") + field(15, b"unknown" * 100), CODE.OK),
        (GENERATE, b"\x22\xff\xff\xff\xff\x0f", CODE.INVALID_ARGUMENT),  # 4 GiB, it says
        (GENERATE, field(2, b"x" * (5 << 20)), CODE.RESOURCE_EXHAUSTED),
        (GENERATE, field(4, b"\x08\x01") * 10000 + field(2, b"1 "), CODE.OK),  # once more, and again
        (GENERATE, b"\x23" * 10000, CODE.INVALID_ARGUMENT),  # groups in groups
        (RESUME, field(1, b"nobody's"), CODE.NOT_FOUND),
        (RESUME, field(1, b"honest"), CODE.NOT_FOUND),  # another key's
        ("moe_jax.v1.Admin/Drain", field(1, b"../../etc/passwd\0"), CODE.NOT_FOUND),
        ("moe_jax.v1.Admin/Destroy", b"", CODE.UNIMPLEMENTED),
    ],
)
def test_by_hand(served, method, data, code):
    assert send(served.channel, method, data) == code


def test_more_than_there_is_to_resume(served):
    list(served.inference.Generate(request(5, request_id="short")))
    for offset, code in ((0, CODE.OK), (5, CODE.OK), (6, CODE.OUT_OF_RANGE), (2**32 - 1, CODE.OUT_OF_RANGE)):
        asked = pb.ResumeRequest(request_id="short", offset=offset)
        assert send(served.channel, RESUME, asked.SerializeToString()) == code


def test_what_is_no_worker(served):
    """Messages on the control stream of a worker, in any order, from one who knows the token."""
    stub, token = cluster_rpc.ClusterStub(served.channel), [(TOKEN_HEADER, TOKEN)]
    beat = cluster_pb.WorkerMessage(heartbeat=cluster_pb.Heartbeat(engine_stopped=True))
    hello = cluster_pb.WorkerMessage(hello=cluster_pb.Hello(rank=2**32 - 1, host="x" * 10000, version="3"))
    for said in ([], [beat], [cluster_pb.WorkerMessage()], [hello, hello, beat]):
        try:
            for answer in stub.Control(iter(said), timeout=5, metadata=token):
                assert answer.WhichOneof("kind") in ("welcome", "dismiss")
        except grpc.RpcError as e:
            assert e.code() == CODE.INVALID_ARGUMENT, e  # type: ignore[attr-defined]
    raw = served.channel.stream_stream("/moe_jax.v1.Cluster/Control")
    with pytest.raises(grpc.RpcError):
        next(raw(iter([b"\xff\xff"]), timeout=5, metadata=token))
    assert all(rank["state"] == "live" for rank in served.status()["ranks"])


def test_many_calls_that_are_dropped_at_once(served):
    for i in range(min(CALLS, 1000)):
        call = served.inference.Generate(request(5000, seed=i))
        call.cancel()
    honest = served.inference.Complete(request(5))
    assert list(honest.token_ids) == tokens(1, 5)
