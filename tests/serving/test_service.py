"""What the service tells beside tokens: health, reflection, details of errors, the model, changes; whose is what."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from signal import SIGKILL
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from serving.access import Key, digest, with_key
from serving.coordinator import SERVER_OPTIONS
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.hex_tokenizer import EOS, TOKENIZER, VOCABULARY
from tests.serving.test_api import PATIENT, Running, joined, refused, request

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

KEYS = {
    "alice": Key("alice", digest("alice's key"), max_requests=2),
    "bob": Key("bob", digest("bob's key"), max_tokens=40, max_priority=3),
    "root": Key("root", digest("root's key"), admin=True, max_priority=9),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    cluster = fake_cluster(("a", "b", "c"), fake={"step": 0.002}, **PATIENT)
    running = Running(cluster, keys=tuple(KEYS.values()), key="root's key", max_output_tokens=16000, name="toy")
    yield running
    running.close()


def stub(running: Running, name: str) -> rpc.InferenceStub:
    return rpc.InferenceStub(grpc.intercept_channel(grpc.insecure_channel(running.address), with_key(f"{name}'s key")))


def details(error: pytest.ExceptionInfo[grpc.RpcError]) -> dict[str, Any]:
    status = rpc_status.from_call(error.value)  # type: ignore[arg-type]
    assert status is not None
    found = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(message)
        found[message.DESCRIPTOR.name] = message
    return found


def test_health_and_reflection(served):
    with grpc.insecure_channel(served.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "moe_jax.v1.Inference", "moe_jax.v1.Admin"):
            # Whoever waits for it is told: that the cluster serves is known a moment before it is said here.
            watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
            watch.cancel()
        with refused(grpc.StatusCode.NOT_FOUND, ""):
            health.Check(health_pb2.HealthCheckRequest(service="x"))
    database = ProtoReflectionDescriptorDatabase(served.channel)
    services = set(database.get_services())
    assert {"moe_jax.v1.Inference", "moe_jax.v1.Admin", "grpc.health.v1.Health"} <= services
    assert "moe_jax.v1.Cluster" not in services
    found = DescriptorPool(database).FindServiceByName("moe_jax.v1.Inference")
    assert "Resume" in found.methods_by_name


def test_details_of_errors(served):
    with pytest.raises(grpc.RpcError) as error:
        served.inference.Complete(request(params={"temperature": -1.0}))
    found = details(error)
    assert found["ErrorInfo"].reason == "INVALID_ARGUMENT" and found["ErrorInfo"].domain == "moe-jax"
    assert [v.field for v in found["BadRequest"].field_violations] == ["temperature"]
    assert "RetryInfo" not in found
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens: found 20001, expected at most 16000"):
        served.inference.Complete(request(20001))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "priority: found 10, expected 0 to 9"):
        served.inference.Complete(request(priority=10))


def test_the_share_of_a_key(served):
    alice, bob = stub(served, "alice"), stub(served, "bob")
    calls = [alice.Generate(request(16000, seed=i)) for i in range(2)]
    first = [next(call) for call in calls]
    assert all(r.token_ids for r in first)
    with pytest.raises(grpc.RpcError) as error:
        alice.Complete(request())
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    delay = details(error)["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    assert 0.1 <= delay <= 60
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "key 'bob': found 0 tokens open and 50 more"):
        bob.Complete(request(token_ids=pb.TokenIds(ids=[1] * 50)))
    assert joined([bob.Complete(request(5, priority=9))])[0] == tokens(1, 5)  # lowered, and served
    for call in calls:
        call.cancel()
    served.no_requests()


def test_nobody_sees_the_requests_of_another(served):
    alice, bob = stub(served, "alice"), stub(served, "bob")
    asked = request(800, request_id="mine")
    call = alice.Generate(asked)
    next(call)
    with refused(grpc.StatusCode.NOT_FOUND, "neither running nor kept"):
        list(bob.Resume(pb.ResumeRequest(request_id="mine")))
    with refused(grpc.StatusCode.ALREADY_EXISTS, "in use"):
        list(bob.Generate(asked))
    assert not bob.Cancel(pb.CancelRequest(request_id="mine")).cancelled
    assert len(list(call)) and alice.Complete(asked).finish_reason == "length"
    with refused(grpc.StatusCode.NOT_FOUND, ""):
        list(bob.Resume(pb.ResumeRequest(request_id="mine")))


def test_text_and_tokens_and_the_model(served):
    inference = served.inference
    for text in ("1a 2b ", "1a 2b " * 500):
        found = inference.Tokenize(pb.TokenizeRequest(text=text))
        assert list(found.token_ids) == TOKENIZER.encode(text)
    assert inference.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2, 31999])).text == TOKENIZER.decode([1, 2, 31999])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "token_ids[1]: found 32000, expected 0 to 31999"):
        inference.Detokenize(pb.DetokenizeRequest(token_ids=[1, 32000]))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "text: found 3000000 bytes"):
        inference.Tokenize(pb.TokenizeRequest(text="x" * 3_000_000))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"):
        inference.Tokenize(pb.TokenizeRequest(text="x" * 5_000_000))
    model = inference.GetModel(pb.GetModelRequest())
    assert (model.name, model.vocab_size, list(model.eos_token_ids)) == ("toy", VOCABULARY, [EOS])
    assert (model.max_model_len, model.max_output_tokens, model.max_logprobs) == (1 << 14, 16000, 5)


def test_watch(served):
    """A loss and a return, as they happen."""
    call, seen = served.admin.Watch(pb.WatchRequest()), []
    thread = threading.Thread(target=lambda: seen.extend(_until_cancelled(call)))
    thread.start()
    before = served.status()
    os.kill(before["ranks"][1]["pid"], SIGKILL)
    after = served.until(lambda s: s["epoch"] == before["epoch"] + 2 and s["state"] == "SERVING")
    deadline = time.monotonic() + 10
    while not (seen and (seen[-1].epoch, seen[-1].state) == (after["epoch"], "SERVING")):
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)
    call.cancel()
    thread.join()
    assert (seen[0].epoch, seen[0].state, list(seen[0].ranks)) == (before["epoch"], "SERVING", [0, 1, 2])
    lost = next(r for r in seen if r.epoch == before["epoch"] + 1 and r.state == "SERVING")
    assert list(lost.ranks) == [0, 2] and list(lost.recovery.lost) == [1] and lost.recovery.cause == "loss"
    assert list(seen[-1].recovery.joined) == [1] and "agree" in seen[-1].recovery.phases_ms
    assert any(r.state == "RECOVERING" for r in seen)


def _until_cancelled(call) -> Iterator[pb.WatchResponse]:
    with suppress(grpc.RpcError):
        yield from call


def test_rebalance(served):
    """After a loss and a return the experts lie as repairs have left them; now as a plan would have them."""
    call = served.inference.Generate(request(800))
    next(call)
    epoch = served.status()["epoch"]
    moved = served.admin.Rebalance(pb.RebalanceRequest(), timeout=20)
    assert moved.epoch >= epoch + bool(moved.slots)  # a part an epoch
    again = served.admin.Rebalance(pb.RebalanceRequest(), timeout=20)
    assert (again.slots, again.epoch) == (0, moved.epoch)
    assert list(call)[-1].usage.completion_tokens == 800


def test_thousands_of_calls_at_once():
    """gRPC itself would end some of them with CANCELLED before anybody here has seen them."""

    async def burst(count: int) -> None:
        server, health = grpc.aio.server(options=SERVER_OPTIONS), HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch  # type: ignore[attr-defined]
            calls = [watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(count)]
            await asyncio.gather(*(call.read() for call in calls))
            for call in calls:
                call.cancel()
        await server.stop(None)

    asyncio.run(burst(3000))


def test_overload():
    """Ten times what the queue holds: it never holds more, who is refused is told when to come again, whoever is
    accepted is served, and after it all is as before."""
    cluster = replace(fake_cluster(("a", "b"), fake={"step": 0.01}, **PATIENT), max_tokens=64 * 40)
    prompt = pb.TokenIds(ids=[1] * 40)
    running = Running(cluster)
    try:
        ledger = running.call(lambda: running.server.coordinator.router.ledger)
        most, served, delays = 0, 0, []
        calls = [running.inference.Complete.future(request(20, seed=i, token_ids=prompt)) for i in range(640)]
        while not all(call.done() for call in calls):
            most = max(most, ledger.tokens)
            time.sleep(0.005)
        for i, call in enumerate(calls):
            if call.code() == grpc.StatusCode.OK:
                served += 1
                assert list(call.result().token_ids) == tokens(i, 20)
            else:
                assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                status = rpc_status.from_call(call)
                assert status is not None
                info = error_details_pb2.RetryInfo()
                assert any(packed.Unpack(info) for packed in status.details)
                delays.append(info.retry_delay.ToTimedelta().total_seconds())
        assert 40 <= served < 640 and 0.1 <= min(delays) <= max(delays) <= 60
        assert 64 * 20 <= most <= 64 * (40 + 20)  # outputs may come on top
        assert list(running.inference.Complete(request(20)).token_ids) == tokens(1, 20)
        running.no_requests()
        counts = running.status()["requests"]
        assert counts["refused"] == len(delays) and not running.call(lambda: running.server.coordinator.metrics._open)
    finally:
        running.close()
