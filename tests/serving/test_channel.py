import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.request import Request, SamplingParams, TokenEvent
from serving import channel as channel_module
from serving.channel import Channel, ChannelClosed, Decoder, Message, encode
from serving.environment import compilation_cache, engine_environment, guess_platform, sharing_cores
from serving.messages import pack_event, pack_request, unpack_event, unpack_request
from serving.outbox import Outbox

BODIES = st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.floats(allow_nan=False)))


@given(st.lists(st.tuples(BODIES, st.binary(max_size=50))), st.data())
def test_messages_survive_any_cutting_of_the_stream(messages, data):
    stream = b"".join(encode(body, blob) for body, blob in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder, out = Decoder(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out += decoder.feed(stream[start:stop])
    assert out == [Message(body, blob) for body, blob in messages]


def test_sizes_are_bounded(monkeypatch):
    monkeypatch.setattr(channel_module, "MAX_MESSAGE", 100)
    with pytest.raises(ValueError, match="found 101|expected at most 100"):
        encode({}, bytes(101))
    with pytest.raises(ValueError, match="expected at most 100"):
        Decoder().feed(b"some words that came from a library's print")


def pair():
    ours, theirs = Channel.pair(timeout=5)
    return ours, Channel(theirs, timeout=5)


def test_large_messages_and_order():
    ours, theirs = pair()
    rows = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)

    def write():
        for i in range(3):
            ours.send({"i": i, "shape": rows.shape}, rows.tobytes())
        ours.close()

    thread = threading.Thread(target=write)
    thread.start()
    got = []
    with pytest.raises(ChannelClosed):
        while True:
            got += theirs.receive()
    thread.join()
    assert [m.body["i"] for m in got] == [0, 1, 2]
    assert np.array_equal(np.frombuffer(got[2].blob, np.float32).reshape(got[2].body["shape"]), rows)
    theirs.close()


def test_a_closed_end_is_an_error_of_its_own():
    ours, theirs = pair()
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send({})
    with pytest.raises(ChannelClosed):
        ours.receive()
    ours.close()


def test_a_send_to_someone_who_does_not_listen_ends():
    ours, theirs = socket.socketpair()
    with pytest.raises(TimeoutError):
        Channel(ours, timeout=0.2).send({}, bytes(10 << 20))
    theirs.close()


def test_requests_and_events_are_the_same_on_the_other_side():
    params = SamplingParams(7, 0.3, 0.9, 5, 2**64 - 1, ("a", "\ud800"), (4,), True, 2)
    request = Request("name", (1, 2, 3), params, (4,), (5, 6))
    (message,) = Decoder().feed(encode(pack_request(12, request)))
    got = unpack_request(message.body)
    assert got == Request("12", (1, 2, 3), params, (4,), (5, 6))
    logprob = float(np.float32(-0.1))
    top = ((9, logprob), (1, -2.5))
    for event in (TokenEvent("12", 3, 9, logprob, top, "stop"), TokenEvent("12", 0, 1, -float("inf"))):
        (message,) = Decoder().feed(encode({"events": [pack_event(event)]}))
        assert unpack_event(message.body["events"][0], "12") == event


def test_environment_of_an_engine():
    base = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8", "JAX_NUM_CPU_DEVICES": "4", "HOME": "/h"}
    env = engine_environment(1, "cpu", base)
    assert env["XLA_FLAGS"] == "--a=1" and env["JAX_PLATFORMS"] == "cpu" and env["HOME"] == "/h"
    assert "JAX_NUM_CPU_DEVICES" not in env and "CUDA_VISIBLE_DEVICES" not in env and env["PYTHONPATH"]
    assert env["MALLOC_ARENA_MAX"] == "4"
    base = {"CUDA_VISIBLE_DEVICES": "3,5", "MALLOC_ARENA_MAX": "8", "XLA_FLAGS": "--xla_gpu_nccl_async_execution=false"}
    env = engine_environment(1, "cuda", base | {"XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": "1"})
    assert env["XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT"] == "0"
    assert env["CUDA_VISIBLE_DEVICES"] == "5" and env["XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE"] == "1"
    assert env["MALLOC_ARENA_MAX"] == "8"
    assert env["XLA_FLAGS"].count("nccl_async_execution") == 1 and "terminate_on_error=false" in env["XLA_FLAGS"]
    assert engine_environment(2, "cuda", {})["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(ValueError, match="GPU for rank 2"):
        engine_environment(2, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1"})
    shared = engine_environment(2, "cuda", {"CUDA_VISIBLE_DEVICES": "1", "MOE_JAX_SHARE_GPU": "1"})
    assert shared["CUDA_VISIBLE_DEVICES"] == "1" and shared["NCCL_HOSTID"] == "host2"


def test_engines_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert sharing_cores(6, "cpu", {"HOME": "/h"}) == {"HOME": "/h", "PJRT_NPROC": "2"}
    assert sharing_cores(1, "cpu", {})["PJRT_NPROC"] == "16" and sharing_cores(40, "cpu", {})["PJRT_NPROC"] == "1"
    for name in ("NPROC", "PJRT_NPROC"):  # somebody has decided
        assert sharing_cores(6, "cpu", {name: "3"}) == {name: "3"}
    assert sharing_cores(6, "cuda", {}) == {}


def test_platform_and_cache_directory(tmp_path):
    assert guess_platform("cpu") == "cpu" and guess_platform("cuda,cpu") == "cuda"
    with pytest.raises(ValueError, match="JAX_PLATFORMS"):
        guess_platform("tpu")
    assert compilation_cache("cuda", None, {"MOE_JAX_CACHE": str(tmp_path)}) == tmp_path
    assert compilation_cache("cpu", tmp_path, {}).parent == tmp_path
    assert compilation_cache("cuda", None, {}).is_absolute()


def test_an_outbox_keeps_the_order_while_nobody_reads():
    ours, theirs = Channel.pair()
    box, reader = Outbox(ours), Channel(theirs)
    sent = [({"type": "n", "n": i}, bytes(i % 7 * 20_000)) for i in range(200)]  # small, large, far more than fits
    for body, blob in sent[:100]:
        box.send(body, blob)
    received: list[Message] = []
    while len(received) < 50:
        received += reader.receive()
    for body, blob in sent[100:]:
        box.send(body, blob)
    while len(received) < len(sent):
        received += reader.receive()
    assert [(m.body["n"], len(m.blob)) for m in received] == [(body["n"], len(blob)) for body, blob in sent]
    reader.close()
    box.send({"type": "n", "n": -1})  # to nobody: the inbox notices


def test_what_is_sent_past_an_outbox_cuts_no_frame():
    """As the report of a process that ends while the other side is behind."""
    ours, theirs = Channel.pair()
    box, reader = Outbox(ours), Channel(theirs)
    for i in range(200):
        box.send({"type": "n", "n": i}, bytes(50_000))
    report = threading.Thread(target=ours.send, args=({"type": "report"},))
    report.start()
    received: list[Message] = []
    while len(received) < 201:
        received += reader.receive()
    report.join()
    assert [m.body["n"] for m in received if m.body["type"] == "n"] == list(range(200))
