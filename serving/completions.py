"""The output of a request as its clients see it: the tokens in the ledger's entry, and the text made of them.

However many follow a request, and however slowly they read, its text is made once, when a token comes, and its tokens
are kept once. A follower is woken by an event and takes what is new since it last looked: one that is behind gets
longer messages, nobody waits for it, and nothing is queued for it. Like the text, what any of them is sent depends on
the tokens only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from moe_jax.request import FinishReason, TokenEvent
from moe_jax.text import Detokenizer, Tokenizer
from serving.ledger import Entry
from serving.protos import inference_pb2 as pb

MESSAGE_TOKENS = 1024  # in one message of a stream at most


class Completion:
    """`take` every token of `entry` from the first on; `tokens`, text and `finish_reason` follow from them."""

    def __init__(self, tokenizer: Tokenizer, entry: Entry) -> None:
        self.entry = entry
        self.finish_reason: FinishReason | None = None
        self.followers = 0
        self._texts: list[str] = []  # what each token adds
        self._detokenizer = Detokenizer(tokenizer, entry.asked.params.stop)
        self._wakes: set[asyncio.Event] = set()
        self._closed = False

    @property
    def request_id(self) -> str:
        return self.entry.asked.request_id

    @property
    def tokens(self) -> int:
        """Of the output so far; the entry may hold more, which came after a stop string and count for nothing."""
        return len(self._texts)

    def take(self, event: TokenEvent) -> None:
        """The next token."""
        if self.finish_reason is not None:
            return
        reason = event.finish_reason
        # A token that ends the request by its id is reported, but is no text.
        text = "" if reason == "stop" else self._detokenizer.push([event.token])
        if reason is not None:
            text += self._detokenizer.flush()
        self._texts.append(text)
        self.finish_reason = reason if self._detokenizer.stop is None else "stop"
        self._wake()

    def take_all(self) -> None:
        """What its entry has so far."""
        for event in self.entry.events():
            self.take(event)

    def abort(self) -> None:
        """It has been cancelled."""
        self.finish_reason = self.finish_reason or "abort"
        self._wake()

    def close(self) -> None:
        """Whoever follows is told no more, though the request may go on."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    async def follow(self, start: int) -> AsyncGenerator[pb.GenerateResponse]:
        """What follows token `start`, as it comes, until there is no more: the last message says why."""
        sent, wake = start, asyncio.Event()
        self._wakes.add(wake)
        try:
            while not self._closed:
                if sent < self.tokens or self.finish_reason is not None:
                    response = self.response(sent, sent + MESSAGE_TOKENS)
                    yield response
                    sent += len(response.token_ids)
                    if response.finish_reason:
                        return
                else:
                    wake.clear()
                    await wake.wait()
        finally:
            self._wakes.discard(wake)

    async def done(self) -> None:
        """Until there is a finish reason, or `close`."""
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            while self.finish_reason is None and not self._closed:
                wake.clear()
                await wake.wait()
        finally:
            self._wakes.discard(wake)

    def response(self, start: int = 0, stop: int | None = None) -> pb.GenerateResponse:
        """Tokens `start` to `stop`, as far as there are; with finish reason and usage if nothing comes after them."""
        entry, params = self.entry, self.entry.asked.params
        stop = self.tokens if stop is None else min(stop, self.tokens)
        response = pb.GenerateResponse(
            request_id=self.request_id,
            token_ids=entry.tokens[start:stop],
            text="".join(self._texts[start:stop]),
            offset=start,
        )
        if params.logprobs is not None:
            for logprob, top in zip(entry.logprobs[start:stop], entry.tops[start:stop], strict=True):
                logprobs = response.logprobs.add(logprob=logprob)
                for token, value in top:
                    logprobs.top.add(token_id=token, logprob=value)
        if self.finish_reason is not None and stop == self.tokens:
            response.finish_reason = self.finish_reason
            response.usage.prompt_tokens = len(entry.asked.token_ids)
            response.usage.completion_tokens = self.tokens
        return response
