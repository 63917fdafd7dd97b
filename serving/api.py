"""The public gRPC services of a coordinator: text for clients, and what operators ask (protos/inference.proto).

They run in the coordinator's event loop, so nothing here may take long: what comes in is bounded before it is looked
at, and a client that reads slowly costs nothing but what it has not read. Which request is where is none of their
business.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress

import grpc

from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.scheduler import QueueFull
from moe_jax.text import Tokenizer
from serving.access import audit, caller
from serving.completions import Completion
from serving.coordinator import Coordinator, Unavailable
from serving.journal import Journal
from serving.ledger import AlreadyExists, Entry
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

MAX_CALLS = 8192  # open at once
MAX_REQUEST_ID = 256  # characters
MAX_STOP = 1024  # characters of a stop string
_INLINE = 1024  # characters of a prompt that are turned into tokens at once; measured: 1 ms
_MAX_DETAILS = 500  # characters of an error: gRPC drops a call whose metadata are above 8 KiB
_OPTIONAL = ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos", "logprobs")


class Invalid(RuntimeError):
    """What the client must change."""


class NotFound(RuntimeError):
    """No request of this id is running or still kept."""


class OutOfRange(RuntimeError):
    """Beyond the tokens that there are."""


_CODES: dict[type[Exception], grpc.StatusCode] = {
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}


class Inference(rpc.InferenceServicer):
    def __init__(
        self,
        coordinator: Coordinator,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        journal: Journal | None = None,
        linger: float = 1.0,
    ) -> None:
        """vocab_size, eos_token_ids: the model's. journal: the coordinator's; it keeps what has ended.

        linger: seconds that a request goes on when the last call that followed it was cancelled or lost its
        connection, for the client to come back in. One whose deadline has passed is cancelled at once.
        """
        self._coordinator, self._tokenizer, self._journal = coordinator, tokenizer, journal
        self._vocab_size, self._eos, self._linger = vocab_size, tuple(eos_token_ids), linger
        vocabulary = [] if tokenizer.backend is None else tokenizer.backend.get_vocab()
        self._longest_token = max((len(token.encode()) for token in vocabulary), default=1)  # bytes
        self._running: dict[str, Completion] = {}  # by request_id
        self._calls = 0
        self._closed = False

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Make the text of requests that go on from another life, though nobody follows them yet.

        Raises ValueError for one that this cluster can never serve.
        """
        for entry in entries:
            self._attach_or_submit(entry.asked, wait=True)

    def close(self) -> None:
        """All calls end with UNAVAILABLE, and no request is cancelled for that."""
        self._closed = True
        for completion in self._running.values():
            completion.close()

    # Calls

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._call(context):
            completion = await self._start(request)
            await self._stream(completion, 0, context)

    async def Complete(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        async with self._call(context):
            completion = await self._start(request)
            with self._following(completion, context):
                await completion.done()
            self._check_open(completion)
            response = completion.response()
        return response

    async def Resume(self, request: pb.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._call(context):
            completion = self._find(request.request_id)
            if request.offset > completion.tokens:
                raise OutOfRange(f"offset: found {request.offset}, expected at most {completion.tokens}, all tokens")
            await self._stream(completion, request.offset, context)

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        completion = self._running.get(request.request_id)
        if completion is not None:
            self._cancel(completion)
        return pb.CancelResponse(cancelled=completion is not None)

    @asynccontextmanager
    async def _call(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """One call among a bounded number. What it raises becomes the status that protos/inference.proto names."""
        self._calls += 1
        try:
            if self._calls > MAX_CALLS:
                raise QueueFull(f"calls: found {self._calls - 1} open, expected fewer: try again later")
            self._check_open()
            yield
        except tuple(_CODES) as e:
            await context.abort(_CODES[type(e)], str(e)[:_MAX_DETAILS])
        finally:
            self._calls -= 1

    async def _stream(self, completion: Completion, start: int, context: grpc.aio.ServicerContext) -> None:
        """`write` returns when gRPC has taken the message; it waits for a client that is behind."""
        with self._following(completion, context), suppress(grpc.aio.InternalError):  # the client has gone
            async with aclosing(completion.follow(start)) as responses:
                async for response in responses:
                    await context.write(response)
            self._check_open(completion)

    @contextmanager
    def _following(self, completion: Completion, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Once nobody follows a request any more, it is cancelled."""
        completion.followers += 1
        try:
            yield
        finally:
            completion.followers -= 1
            if not completion.followers and completion.finish_reason is None:
                left = context.time_remaining()
                late = left is not None and left <= 0
                asyncio.get_running_loop().call_later(0 if late else self._linger, self._abandon, completion)

    def _abandon(self, completion: Completion) -> None:
        if not completion.followers and completion.finish_reason is None and not self._closed:
            self._cancel(completion)

    def _check_open(self, completion: Completion | None = None) -> None:
        if self._closed and (completion is None or completion.finish_reason is None):
            raise Unavailable("the server shuts down")

    # Requests

    async def _start(self, asked: pb.GenerateRequest) -> Completion:
        """The completion that is asked for. Raises what `_CODES` has."""
        try:
            return self._attach_or_submit(await self._request(asked))
        except ValueError as e:
            raise Invalid(str(e)) from e

    def _attach_or_submit(self, request: Request, wait: bool = False) -> Completion:
        """One that is running, or has ended a while ago, if it is the same; else a new one."""
        name = request.request_id
        running = self._running.get(name)
        if running is not None:
            running.entry.attach(request)
            return running
        # Tokens that there are already come before there is a completion to take them.
        entry = self._coordinator.submit(request, self._take, wait)
        completion = Completion(self._tokenizer, entry)
        if entry.ended:
            completion.take_all()
        else:
            self._running[name] = completion
            for event in entry.events():
                self._take(event)
        return completion

    async def _request(self, asked: pb.GenerateRequest) -> Request:
        """Raises ValueError for what cannot be served."""
        if len(asked.request_id) > MAX_REQUEST_ID:
            found = len(asked.request_id)
            raise ValueError(f"request_id: found {found} characters, expected at most {MAX_REQUEST_ID}")
        for i, stop in enumerate(asked.params.stop):
            if len(stop) > MAX_STOP:
                raise ValueError(f"stop[{i}]: found {len(stop)} characters, expected at most {MAX_STOP}")
        given = {name: getattr(asked.params, name) for name in _OPTIONAL if asked.params.HasField(name)}
        params = SamplingParams(stop=asked.params.stop, stop_token_ids=asked.params.stop_token_ids, **given)
        match asked.WhichOneof("input"):
            case "prompt":
                token_ids: Sequence[int] = await self._encode(asked.prompt)
            case "token_ids":
                token_ids = asked.token_ids.ids
            case _:
                raise ValueError("input: found none, expected prompt or token_ids")
        most = self._coordinator.cluster.limits.max_model_len - 1
        if len(token_ids) > most:
            raise ValueError(f"prompt: found {len(token_ids)} tokens, expected at most {most} (max_model_len - 1)")
        for i, token in enumerate(token_ids):
            if token >= self._vocab_size:
                raise ValueError(f"token_ids[{i}]: found {token}, expected 0 to {self._vocab_size - 1}")
        return Request(asked.request_id or secrets.token_hex(8), token_ids, params, eos_token_ids=self._eos)

    async def _encode(self, prompt: str) -> list[int]:
        if len(prompt) <= _INLINE:
            return self._tokenizer.encode(prompt)
        found, most = len(prompt.encode()), self._coordinator.cluster.limits.max_model_len * self._longest_token
        if found > most:
            raise ValueError(f"prompt: found {found} bytes, expected at most {most}, in which no more tokens fit")
        return await asyncio.to_thread(self._tokenizer.encode, prompt)

    def _take(self, event: TokenEvent) -> None:
        completion = self._running.get(event.request_id)
        if completion is None:
            return
        completion.take(event)
        if completion.finish_reason is not None:
            del self._running[event.request_id]
            if event.finish_reason is None:
                self._coordinator.router.finish(completion.entry)

    def _cancel(self, completion: Completion) -> None:
        del self._running[completion.request_id]
        self._coordinator.router.cancel(completion.entry)
        completion.abort()

    def _find(self, request_id: str) -> Completion:
        found = self._running.get(request_id) or self._ended(request_id)
        if found is None:
            raise NotFound(f"request_id: found {request_id[:MAX_REQUEST_ID]!r}, which is neither running nor kept")
        return found

    def _ended(self, request_id: str) -> Completion | None:
        """Its text is the same again, for it is made of the same tokens."""
        entry = None if self._journal is None else self._journal.ended(request_id)
        if entry is None:
            return None
        completion = Completion(self._tokenizer, entry)
        completion.take_all()
        return completion


class Admin(rpc.AdminServicer):
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.StatusResponse:
        return pb.StatusResponse(json=json.dumps(self._coordinator.status()))

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.DrainResponse:
        what = f"Drain {request.host[:256]!r}"
        try:
            left = await self._coordinator.drain(request.host)
        except LookupError as e:
            await _refuse(context, what, grpc.StatusCode.NOT_FOUND, e)
        except Unavailable as e:
            await _refuse(context, what, grpc.StatusCode.FAILED_PRECONDITION, e)
        _audit(context, what, "OK")
        return pb.DrainResponse(**left)


async def _refuse(context: grpc.aio.ServicerContext, what: str, code: grpc.StatusCode, why: Exception) -> None:
    _audit(context, what, code.name)
    await context.abort(code, str(why)[:_MAX_DETAILS])


def _audit(context: grpc.aio.ServicerContext, what: str, outcome: str) -> None:
    """What an operator had done, or tried."""
    who = {"key": caller().name, "peer": context.peer(), "outcome": outcome}
    audit.info("%s by %r from %s: %s", what, who["key"], who["peer"], outcome, extra=who)


def add_to(server: grpc.aio.Server, inference: Inference, admin: Admin) -> None:
    rpc.add_InferenceServicer_to_server(inference, server)
    rpc.add_AdminServicer_to_server(admin, server)
