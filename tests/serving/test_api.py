"""The public services as a client meets them: real gRPC, real worker processes, engines that compute nothing."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from signal import SIGKILL
from typing import Any, TypeVar

import grpc
import pytest

import serving.api
from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.text import full_text
from serving.access import with_key
from serving.cluster import Cluster
from serving.completions import MESSAGE_TOKENS, Completion
from serving.journal import Journal
from serving.launcher import Launcher
from serving.ledger import Entry
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc
from serving.server import Server
from serving.tls import Tls
from tests.serving.clusters import fake_cluster
from tests.serving.fake_engine import tokens
from tests.serving.hex_tokenizer import EOS, TOKENIZER, VOCABULARY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

T = TypeVar("T")


class Running:
    """A server in an event loop of its own, with clients that block."""

    def __init__(
        self,
        cluster: Cluster,
        journal: Any = None,
        client: Tls | None = None,
        key: str | None = None,
        prepare: Callable[[Server], None] = lambda server: None,
        **given: Any,
    ) -> None:
        """client, key: what this client shows. prepare: called before the server listens. given: of Server."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> tuple[Server, str, Launcher]:
            server = Server(cluster, Journal(journal), TOKENIZER, VOCABULARY, (EOS,), linger=0.5, **given)
            prepare(server)
            address = await server.start("127.0.0.1:0")
            return server, address, server.start_workers("cpu")

        self.server, self.address, self.launcher = self.run(start())
        self.channel = grpc.insecure_channel(self.address)
        if client is not None:
            self.channel = grpc.secure_channel(self.address, client.channel_credentials())
        if key is not None:
            self.channel = grpc.intercept_channel(self.channel, with_key(key))
        self.inference, self.admin = rpc.InferenceStub(self.channel), rpc.AdminStub(self.channel)
        self.until(lambda status: all(r["state"] == "live" for r in status["ranks"]))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return self.run(run())

    def status(self) -> dict[str, Any]:
        return json.loads(self.admin.Status(pb.StatusRequest()).json)

    def until(self, done: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not done(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    def no_requests(self) -> None:
        """Until nothing is left of any."""
        self.until(lambda status: status["requests"]["open"] == 0)
        assert not self.call(lambda: self.server.inference._running)

    def close(self) -> None:
        self.run(self.server.close())
        self.channel.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def serving_cluster(cluster: Cluster, **options: Any) -> Iterator[Running]:
    running = Running(cluster, **options)
    try:
        yield running
    finally:
        running.close()


PATIENT: dict[str, Any] = {"heartbeat_timeout_s": 10.0}  # these tests are not about detection


@pytest.fixture(scope="module")
def three() -> Iterator[Running]:
    with serving_cluster(fake_cluster(("a", "b", "c"), fake={"step": 0.002}, **PATIENT)) as running:
        yield running


def request(length: int = 20, seed: int = 1, **given: Any) -> pb.GenerateRequest:
    """Its output is tokens(seed, length)."""
    params = {"max_tokens": length, "seed": seed, "ignore_eos": True} | given.pop("params", {})
    given = {"token_ids": pb.TokenIds(ids=[1, 2, 3])} | given
    return pb.GenerateRequest(params=pb.SamplingParams(**params), **given)


def joined(responses: Sequence[pb.GenerateResponse]) -> tuple[list[int], str, str]:
    """(tokens, text, finish reason) of a stream, which must be whole and in order."""
    token_ids = list(responses[0].token_ids)
    for response in responses[1:]:
        assert response.offset == responses[0].offset + len(token_ids)
        token_ids += response.token_ids
    assert len({r.request_id for r in responses}) == 1
    assert all(r.finish_reason == "" and not r.HasField("usage") for r in responses[:-1])
    assert responses[-1].usage.completion_tokens == responses[0].offset + len(token_ids)
    return token_ids, "".join(r.text for r in responses), responses[-1].finish_reason


def expected(seed: int, length: int) -> tuple[list[int], str, str]:
    return tokens(seed, length), full_text(TOKENIZER, tokens(seed, length)).text, "length"


@contextmanager
def refused(code: grpc.StatusCode, message: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as error:
        yield
    assert error.value.code() == code, error.value  # type: ignore[attr-defined]
    assert message in error.value.details()  # type: ignore[attr-defined]


# What comes


def test_stream_and_unary(three):
    assert "é" in expected(1, 400)[1]
    responses = list(three.inference.Generate(request(400)))
    assert joined(responses) == expected(1, 400) and len(responses) > 10
    assert responses[-1].usage.prompt_tokens == 3 and not responses[0].logprobs
    one = three.inference.Complete(request(400))
    assert joined([one]) == expected(1, 400)
    assert one.request_id != responses[0].request_id and one.request_id  # drawn
    unseeded = three.inference.Complete(pb.GenerateRequest(prompt="1a 2b "))
    assert len(unseeded.token_ids) == 16 and unseeded.usage.prompt_tokens == 2
    three.no_requests()


def test_many_at_once(three):
    calls = [three.inference.Generate(request(60, seed=i)) for i in range(24)]
    for i, call in enumerate(calls):
        assert joined(list(call)) == expected(i, 60)


def test_logprobs(three):
    responses = list(three.inference.Generate(request(5, params={"logprobs": 0})))
    assert [x.logprob for r in responses for x in r.logprobs] == [-0.5] * 5


@pytest.mark.parametrize("seed", [2, 3])
def test_stop_string(three, seed):
    text = expected(seed, 60)[1]
    stop = text[100:104]
    cut = full_text(TOKENIZER, tokens(seed, 5000), [stop])
    asked = request(5000, seed, params={"stop": ["never comes", stop]}, request_id=f"stop-{seed}")
    token_ids, found, reason = joined(list(three.inference.Generate(asked)))
    assert (token_ids, found, reason) == (tokens(seed, cut.tokens), cut.text, "stop")
    three.no_requests()  # the engine was told
    again = three.inference.Complete(asked)  # ended: made again from what is kept
    assert joined([again]) == (token_ids, found, reason)


def test_a_killed_engine_is_a_pause(three):
    calls = [three.inference.Generate(request(600, seed=i)) for i in range(6)]
    first = [[next(call)] for call in calls]
    os.kill(three.status()["ranks"][1]["pid"], SIGKILL)
    for i, call in enumerate(calls):
        assert joined(first[i] + list(call)) == expected(i, 600)
    three.until(lambda status: all(r["state"] == "live" for r in status["ranks"]))


# What goes


def test_cancelled_by_its_client(three):
    cancelled = three.status()["requests"]["cancelled"]
    call = three.inference.Generate(request(16000))
    next(call)
    call.cancel()
    three.no_requests()
    with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
        three.inference.Complete(request(16000), timeout=0.3)
    three.no_requests()
    assert three.status()["requests"]["cancelled"] == cancelled + 2


def test_nothing_lingers_after_a_deadline(three, monkeypatch):
    """Whoever hears of it first, the client or the server."""
    monkeypatch.setattr(three.server.inference, "_linger", 1e6)
    for timeout in (0.02 + 0.002 * i for i in range(15)):
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
            three.inference.Complete(request(16000), timeout=timeout)
        with refused(grpc.StatusCode.DEADLINE_EXCEEDED, ""):
            list(three.inference.Generate(request(16000), timeout=timeout))
    three.no_requests()


def test_cancelled_by_another(three):
    call = three.inference.Generate(request(16000, request_id="x"))
    first = next(call)
    assert three.inference.Cancel(pb.CancelRequest(request_id="x")).cancelled
    token_ids, _, reason = joined([first, *call])
    assert reason == "abort" and token_ids == tokens(1, len(token_ids))
    assert not three.inference.Cancel(pb.CancelRequest(request_id="x")).cancelled
    with refused(grpc.StatusCode.NOT_FOUND, "'x'"):
        list(three.inference.Resume(pb.ResumeRequest(request_id="x")))


# More than one call for a request


def test_attach(three):
    asked = request(700, request_id="attach")
    first = three.inference.Generate(asked)
    begun = [next(first) for _ in range(20)]
    second = three.inference.Generate(asked)
    with refused(grpc.StatusCode.ALREADY_EXISTS, "'attach'"):
        list(three.inference.Generate(request(701, request_id="attach")))
    assert begun[-1].request_id == "attach"
    first.cancel()  # the other call keeps it
    assert joined(list(second)) == expected(1, 700)
    accepted = three.status()["requests"]["accepted"]
    assert joined(list(three.inference.Generate(asked))) == expected(1, 700)
    assert three.status()["requests"]["accepted"] == accepted
    # Its id is free again for another.
    assert joined([three.inference.Complete(request(3, request_id="attach"))]) == expected(1, 3)


def test_resume(three):
    asked = request(700, request_id="resume")
    call = three.inference.Generate(asked)
    begun = [next(call) for _ in range(20)]
    have = begun[-1].offset + len(begun[-1].token_ids)
    with refused(grpc.StatusCode.OUT_OF_RANGE, "offset: found 16000"):
        list(three.inference.Resume(pb.ResumeRequest(request_id="resume", offset=16000)))
    call.cancel()  # as if the connection was lost
    rest = list(three.inference.Resume(pb.ResumeRequest(request_id="resume", offset=have)))
    assert rest[0].offset == have
    assert joined([*begun, *rest]) == expected(1, 700)
    three.no_requests()
    end = list(three.inference.Resume(pb.ResumeRequest(request_id="resume", offset=700)))
    assert len(end) == 1 and not end[0].token_ids and end[0].finish_reason == "length"
    with refused(grpc.StatusCode.NOT_FOUND, "'nobody'"):
        list(three.inference.Resume(pb.ResumeRequest(request_id="nobody")))


def test_a_slow_client_holds_nobody_up(three):
    long_id = "s" * 256  # makes messages that soon fill what gRPC has room for
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(three.address, options) as channel:
        slow = rpc.InferenceStub(channel).Generate(request(2500, request_id=long_id))
        begun = [next(slow)]
        others = [three.inference.Generate(request(100, seed=i)) for i in range(4)]
        for i, call in enumerate(others):
            assert joined(list(call)) == expected(i, 100)
        three.no_requests()  # all of it is computed, and little of it read
        responses = begun + list(slow)
    assert joined(responses) == expected(1, 2500)
    assert max(len(r.token_ids) for r in responses) > 1000 and len(responses) < 1500


# What is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token_ids": None}, "input: found none, expected prompt or token_ids"),
        ({"token_ids": pb.TokenIds()}, "token_ids: found (), expected a prompt of at least one token"),
        ({"token_ids": None, "prompt": ""}, "expected a prompt of at least one token"),
        ({"token_ids": pb.TokenIds(ids=[1, VOCABULARY])}, f"token_ids[1]: found {VOCABULARY}, expected 0 to 31999"),
        ({"token_ids": pb.TokenIds(ids=[2**32 - 1])}, "token_ids[0]: found 4294967295"),
        ({"token_ids": pb.TokenIds(ids=[1] * 16384)}, "found 16384 tokens, expected at most 16383"),
        ({"token_ids": pb.TokenIds(ids=[1] * 2_000_000)}, "found 2000000 tokens, expected at most 16383"),
        ({"token_ids": None, "prompt": "1 " * 20000}, "found 20000 tokens, expected at most 16383"),
        ({"token_ids": None, "prompt": "x" * 2_000_000}, "prompt: found 2000000 bytes, expected at most"),
        ({"request_id": "x" * 257}, "request_id: found 257 characters, expected at most 256"),
        ({"params": {"max_tokens": 0}}, "max_tokens: found 0"),
        ({"params": {"temperature": float("nan")}}, "temperature: found nan"),
        ({"params": {"temperature": -1.0}}, "temperature: found -1.0"),
        ({"params": {"top_p": 0.0}}, "top_p: found 0.0"),
        ({"params": {"top_k": 2**31}}, "top_k: found 2147483648"),
        ({"params": {"logprobs": 6}}, "logprobs: found 6"),
        ({"params": {"stop": [""]}}, "stop[0]: found ''"),
        ({"params": {"stop": ["x"] * 17}}, "stop: found '17 strings', expected at most 16"),
        ({"params": {"stop": ["x", "y" * 1025]}}, "stop[1]: found 1025 characters, expected at most 1024"),
        ({"params": {"stop_token_ids": range(17)}}, "stop_token_ids: found '17 tokens', expected at most 16"),
    ],
)
@pytest.mark.parametrize("method", ["Generate", "Complete"])
def test_invalid_argument(three, given, message, method):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, message):
        answer = getattr(three.inference, method)(request(**given))
        list(answer) if method == "Generate" else None


def test_resource_exhausted(three, monkeypatch):
    ledger = three.call(lambda: three.server.coordinator.router.ledger)
    monkeypatch.setattr(ledger, "max_jobs", 0)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: found 0 requests, expected fewer: try again later"):
        three.inference.Complete(request())
    monkeypatch.undo()
    monkeypatch.setattr(serving.api, "MAX_CALLS", 0)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "calls: found 0 open, expected fewer"):
        list(three.inference.Generate(request()))
    monkeypatch.undo()
    assert joined([three.inference.Complete(request(3))]) == expected(1, 3)


def test_unavailable():
    """New requests are refused; one that was accepted goes on when there are enough ranks again."""
    with serving_cluster(fake_cluster(("a", "b"), slots=4, replication=1, fake={"step": 0.005}, **PATIENT)) as r:
        r.launcher.retire()
        asked = request(400, request_id="accepted")
        call = r.inference.Generate(asked)
        begun = [next(call)]
        os.kill(r.status()["ranks"][1]["pid"], SIGKILL)
        r.until(lambda status: status["state"] == "UNSERVABLE")
        with refused(grpc.StatusCode.UNAVAILABLE, "too few slots"):
            list(r.inference.Generate(request()))
        attached = r.inference.Generate(asked)
        begun_too = [next(attached)]
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "UNSERVABLE"):
            r.admin.Drain(pb.DrainRequest(host="a"))
        r.call(lambda: r.launcher.start([1]))
        assert joined(begun + list(call)) == joined(begun_too + list(attached)) == expected(1, 400)


# Another life of the coordinator


def test_a_later_server_goes_on(tmp_path):
    cluster = fake_cluster(("a", "b"), fake={"step": 0.02}, **PATIENT)
    stop = expected(5, 40)[1][80:84]
    asked = request(100, request_id="kept")
    with serving_cluster(cluster, journal=tmp_path / "journal") as r:
        calls = [r.inference.Generate(asked), r.inference.Generate(request(900, 5, params={"stop": [stop]}))]
        begun = [next(calls[0]) for _ in range(5)]
        other = next(calls[1]).request_id
        numbers = r.status()["epoch"]
        closing = threading.Thread(target=lambda: r.run(r.server.close()))
        closing.start()
        for call in calls:
            with refused(grpc.StatusCode.UNAVAILABLE, "the server shuts down"):
                list(call)
        closing.join()
    with serving_cluster(cluster, journal=tmp_path / "journal") as r:
        assert r.status()["epoch"] > numbers
        have = begun[-1].offset + len(begun[-1].token_ids)
        rest = list(r.inference.Resume(pb.ResumeRequest(request_id="kept", offset=have)))
        assert joined([*begun, *rest]) == expected(1, 100)
        cut = full_text(TOKENIZER, tokens(5, 900), [stop])
        found = list(r.inference.Resume(pb.ResumeRequest(request_id=other)))  # nobody followed it meanwhile
        assert joined(found) == (tokens(5, cut.tokens), cut.text, "stop")
        r.no_requests()


# Operators


def test_status(three):
    status = three.status()
    assert status["state"] == "SERVING" and status["epoch"] >= 1 and isinstance(status["compilations"], int)
    assert [r["host"] for r in status["ranks"]] == ["a", "b", "c"]
    for rank in status["ranks"]:
        assert {"rank", "host", "pid", "state", "device"} <= rank.keys()
    experts = {"logical", "slots", "missing", "min_replicas", "survivable_host_losses", "imbalance"}
    assert experts == status["experts"].keys() and status["experts"]["missing"] == 0
    phases = [f"{p}_ms" for p in ("detect", "fence", "agree", "load", "compile", "rebuild", "resume", "pause")]
    for change in status["recoveries"]:
        assert {"epoch", "lost", "joined", *phases} <= change.keys()


def test_drain(three):
    with refused(grpc.StatusCode.NOT_FOUND, "'x', expected one of a, b, c"):
        three.admin.Drain(pb.DrainRequest(host="x"))
    calls = [three.inference.Generate(request(500, seed=i)) for i in range(6)]
    begun = [[next(call)] for call in calls]
    before = three.status()["epoch"]
    left = three.admin.Drain(pb.DrainRequest(host="c"))
    assert list(left.ranks) == [2] and left.epoch > before
    for i, call in enumerate(calls):
        assert joined(begun[i] + list(call)) == expected(i, 500)
    assert three.status()["ranks"][2]["state"] == "lost"
    again = three.admin.Drain(pb.DrainRequest(host="c"))  # a client that does not know how it went
    assert (list(again.ranks), again.epoch) == ([], left.epoch)


def test_undrain(three):
    with refused(grpc.StatusCode.NOT_FOUND, "'x', expected one of a, b, c"):
        three.admin.Undrain(pb.UndrainRequest(host="x"))
    three.admin.Drain(pb.DrainRequest(host="c"))  # whether or not it has left before
    back = three.admin.Undrain(pb.UndrainRequest(host="c"), timeout=30)
    status = three.status()
    assert list(back.ranks) == [2] and [r["state"] for r in status["ranks"]] == ["live"] * 3
    again = three.admin.Undrain(pb.UndrainRequest(host="c"), timeout=5)
    assert (list(again.ranks), again.epoch) == ([2], status["epoch"])


# Without a server


def completion(**params: Any) -> Completion:
    return Completion(TOKENIZER, Entry(1, Request("r", [1], SamplingParams(seed=0, **params)), 0))


def give(c: Completion, count: int, reason: Any = None) -> None:
    """The next tokens, which count from 0; the last one with this finish reason."""
    end = c.tokens + count
    for index in range(c.tokens, end):
        top = (index, -1.0), (0, -2.0)
        event = TokenEvent("r", index, index, -1.0, top, reason if index == end - 1 else None)
        c.entry.append(event)
        c.take(event)


def test_a_token_that_ends_the_output_is_no_text():
    c = completion()
    for token, reason in ((17, None), (EOS, "stop")):
        event = TokenEvent("r", c.tokens, token, -1.0, (), reason)  # type: ignore[arg-type]
        c.entry.append(event)
        c.take(event)
    response = c.response()
    assert list(response.token_ids) == [17, EOS] and response.finish_reason == "stop"
    assert response.text == full_text(TOKENIZER, [17]).text
    c.abort()
    assert c.finish_reason == "stop"


def test_who_is_behind_gets_longer_messages():
    async def main() -> None:
        c = completion(logprobs=2)
        follower = c.follow(0)
        give(c, 1)
        assert len((await anext(follower)).token_ids) == 1
        give(c, 30)
        assert len((await anext(follower)).token_ids) == 30
        give(c, MESSAGE_TOKENS + 5, "length")
        long, last = await anext(follower), await anext(follower)
        assert (len(long.token_ids), len(last.token_ids)) == (MESSAGE_TOKENS, 5)
        assert long.finish_reason == "" and last.finish_reason == "length" and last.offset == 31 + MESSAGE_TOKENS
        assert [x.token_id for x in long.logprobs[0].top] == [31, 0] and len(long.logprobs) == MESSAGE_TOKENS
        assert [r async for r in follower] == [] and not c._wakes

    asyncio.run(main())


def test_closing_ends_the_stream_without_a_last_message():
    async def main() -> None:
        c = completion()
        give(c, 2)
        reading = asyncio.create_task(collect(c))
        await asyncio.sleep(0)
        c.close()
        assert [len(r.token_ids) for r in await reading] == [2] and c.finish_reason is None

    async def collect(c: Completion) -> list[pb.GenerateResponse]:
        return [r async for r in c.follow(0)]

    asyncio.run(main())
