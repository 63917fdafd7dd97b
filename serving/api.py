"""The public gRPC service of a coordinator: text for clients (protos/inference.proto, service Inference).

It runs in the coordinator's event loop, so nothing here may take long: what comes in is bounded before it is looked
at, and a client that reads slowly costs nothing but what it has not read. Which request is where is none of its
business.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress

import grpc

from moe_jax.request import MAX_LOGPROBS, Request, SamplingParams, TokenEvent
from moe_jax.scheduler import QueueFull
from moe_jax.text import Tokenizer
from serving.access import Key, caller
from serving.admission import MAX_PRIORITY, Owner
from serving.completions import Completion
from serving.coordinator import Coordinator, Unavailable
from serving.errors import CODES, Invalid, NotFound, OutOfRange, abort
from serving.journal import Journal
from serving.ledger import Entry
from serving.protos import inference_pb2 as pb
from serving.protos import inference_pb2_grpc as rpc

MAX_CALLS = 8192  # open at once
MAX_REQUEST_ID = 256  # characters
MAX_STOP = 1024  # characters of a stop string
_INLINE = 1024  # characters of a prompt that are turned into tokens at once; measured: 1 ms
_OPTIONAL = ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos", "logprobs")


def _owner(key: Key) -> Owner:
    return Owner(key.name, key.weight, key.max_requests, key.max_tokens)


class Inference(rpc.InferenceServicer):
    def __init__(
        self,
        coordinator: Coordinator,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        journal: Journal | None = None,
        linger: float = 1.0,
        max_output_tokens: int | None = None,
        name: str = "",
    ) -> None:
        """vocab_size, eos_token_ids, name: the model's. journal: the coordinator's; it keeps what has ended.

        linger: seconds that a request goes on when the last call that followed it was cancelled or lost its
        connection, for the client to come back in. One whose deadline has passed is cancelled at once.
        max_output_tokens: that a request may ask for; None: as many as fit.
        """
        self._coordinator, self._tokenizer, self._journal = coordinator, tokenizer, journal
        self._vocab_size, self._eos, self._linger = vocab_size, tuple(eos_token_ids), linger
        self._most, self._name = max_output_tokens, name
        vocabulary = [] if tokenizer.backend is None else tokenizer.backend.get_vocab()
        self._longest_token = max((len(token.encode()) for token in vocabulary), default=1)  # bytes
        self._running: dict[str, Completion] = {}  # by request_id
        self._calls = 0
        self._closed = self._refusing = False

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Make the text of requests that go on from another life, though nobody follows them yet.

        Raises ValueError for one that this cluster can never serve.
        """
        for entry in entries:
            self._attach_or_submit(entry.asked, entry.owner, entry.priority, wait=True)

    @property
    def max_output_tokens(self) -> int:
        """That a request may get."""
        fit = self._coordinator.cluster.limits.max_model_len - 1
        return fit if self._most is None else min(self._most, fit)

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Of them, those that no rank has been given yet."""
        return min(self._coordinator.router.ledger.waiting, self.running)

    @property
    def unavailable(self) -> str | None:
        """Why new requests are refused, if they are."""
        return "the server shuts down" if self._refusing or self._closed else self._coordinator.unservable

    def refuse(self) -> None:
        """New requests, from now on: the server is about to end. Those that are open go on."""
        self._refusing = True

    def close(self) -> None:
        """All calls end with UNAVAILABLE, and no request is cancelled for that."""
        self._closed = True
        for completion in self._running.values():
            completion.close()

    # Calls

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self.call(context):
            completion = await self.start(request)
            await self._stream(completion, 0, context)

    async def Complete(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        async with self.call(context):
            completion = await self.start(request)
            with self.following(completion, context):
                await completion.done()
            self.check_open(completion)
            response = completion.response()
        return response

    async def Resume(self, request: pb.ResumeRequest, context: grpc.aio.ServicerContext) -> None:
        async with self.call(context):
            completion = self._find(request.request_id)
            if request.offset > completion.tokens:
                raise OutOfRange(f"offset: found {request.offset}, expected at most {completion.tokens}, all tokens")
            await self._stream(completion, request.offset, context)

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        completion = self._running.get(request.request_id)
        if completion is None or completion.entry.owner.name != caller().name:
            return pb.CancelResponse(cancelled=False)
        self._cancel(completion)
        return pb.CancelResponse(cancelled=True)

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        response = pb.TokenizeResponse()
        async with self.call(context):
            try:
                response.token_ids.extend(await self._encode(request.text, "text"))
            except ValueError as e:
                raise Invalid(str(e)) from e
        return response

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        response = pb.DetokenizeResponse()
        async with self.call(context):
            try:
                self._check_tokens(request.token_ids, self._coordinator.cluster.limits.max_model_len)
            except ValueError as e:
                raise Invalid(str(e)) from e
            response.text = await asyncio.to_thread(self._tokenizer.decode, request.token_ids)
        return response

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:
        return pb.GetModelResponse(
            name=self._name,
            vocab_size=self._vocab_size,
            max_model_len=self._coordinator.cluster.limits.max_model_len,
            max_output_tokens=self.max_output_tokens,
            eos_token_ids=self._eos,
            max_logprobs=MAX_LOGPROBS,
            version=importlib.metadata.version("moe-jax"),
        )

    @asynccontextmanager
    async def call(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """One call among a bounded number. What it raises becomes the status that protos/inference.proto names."""
        self._calls += 1
        try:
            if self._calls > MAX_CALLS:
                raise QueueFull(f"calls: found {self._calls - 1} open, expected fewer: try again later")
            self.check_open()
            yield
        except tuple(CODES) as e:
            await abort(context, e, self._coordinator.router.retry_after(_owner(caller())))
        finally:
            self._calls -= 1

    async def _stream(self, completion: Completion, start: int, context: grpc.aio.ServicerContext) -> None:
        """`write` returns when gRPC has taken the message; it waits for a client that is behind."""
        with self.following(completion, context), suppress(grpc.aio.InternalError):  # the client has gone
            async with aclosing(completion.follow(start)) as responses:
                async for response in responses:
                    await context.write(response)
            self.check_open(completion)

    @contextmanager
    def following(self, completion: Completion, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Once nobody follows a request any more, it is cancelled: a little later, for a client may come again whose
        connection broke, but not beyond its deadline, of which it may hear before we do."""
        completion.followers += 1
        try:
            yield
        finally:
            completion.followers -= 1
            if not completion.followers and completion.finish_reason is None:
                left = context.time_remaining()
                linger = self._linger if left is None else min(self._linger, max(0.0, left))
                asyncio.get_running_loop().call_later(linger, self._abandon, completion)

    def _abandon(self, completion: Completion) -> None:
        if not completion.followers and completion.finish_reason is None and not self._closed:
            self._cancel(completion)

    def check_open(self, completion: Completion | None = None) -> None:
        if self._closed and (completion is None or completion.finish_reason is None):
            raise Unavailable("the server shuts down")

    # Requests

    async def start(self, asked: pb.GenerateRequest) -> Completion:
        """The completion that is asked for. Raises what errors.CODES has."""
        key = caller()
        try:
            if asked.priority > MAX_PRIORITY:
                raise ValueError(f"priority: found {asked.priority}, expected 0 to {MAX_PRIORITY}")
            return self._attach_or_submit(
                await self._request(asked), _owner(key), min(asked.priority, key.max_priority)
            )
        except ValueError as e:
            raise Invalid(str(e)) from e

    def _attach_or_submit(self, request: Request, owner: Owner, priority: int, wait: bool = False) -> Completion:
        """One that is running, or has ended a while ago, if it is the same; else a new one."""
        name = request.request_id
        running = self._running.get(name)
        if running is not None:
            running.entry.attach(request, owner)
            return running
        if self._refusing and not wait:
            raise Unavailable("the server shuts down")
        # Tokens that there are already come before there is a completion to take them.
        entry = self._coordinator.submit(request, self._take, wait, owner, priority)
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
        self._check_tokens(token_ids, most)
        if self._most is not None and params.max_tokens > self._most:
            raise ValueError(f"max_tokens: found {params.max_tokens}, expected at most {self._most}")
        return Request(asked.request_id or secrets.token_hex(8), token_ids, params, eos_token_ids=self._eos)

    async def _encode(self, text: str, name: str = "prompt") -> list[int]:
        if len(text) <= _INLINE:
            return self._tokenizer.encode(text)
        found, most = len(text.encode()), self._coordinator.cluster.limits.max_model_len * self._longest_token
        if found > most:
            raise ValueError(f"{name}: found {found} bytes, expected at most {most}, in which no more tokens fit")
        return await asyncio.to_thread(self._tokenizer.encode, text)

    def _check_tokens(self, token_ids: Sequence[int], most: int) -> None:
        if len(token_ids) > most:
            raise ValueError(f"token_ids: found {len(token_ids)} tokens, expected at most {most}")
        for i, token in enumerate(token_ids):
            if token >= self._vocab_size:
                raise ValueError(f"token_ids[{i}]: found {token}, expected 0 to {self._vocab_size - 1}")

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
        if found is None or found.entry.owner.name != caller().name:
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
