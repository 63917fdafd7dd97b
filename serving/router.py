"""Requests to engines, tokens to clients. It knows who may be given work, not why.

A request goes to one engine, and after it a bell, a number that only grows, to every engine of the mesh: one whose rank
has no work waits inside a step as soon as any has, so all must be woken (moe_jax.engine).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.request import Request, TokenEvent
from moe_jax.scheduler import Limits, QueueFull
from serving.admission import Owner, Pace
from serving.channel import Message, encode
from serving.epoch import Epoch
from serving.journal import Journal
from serving.ledger import Entry, Ledger, Place, Score
from serving.metrics import Metrics, Step
from serving.recoveries import Recoveries

_NOBODY = Owner()
Listener = Callable[[TokenEvent], None]


class Oblivion:
    """A journal that keeps nothing."""

    last_numbers = (0, 0, 0)
    first_number = 1
    last_epoch: Epoch | None = None
    unfinished: Sequence[Entry] = ()

    def orders(self, generation: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        return {}

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _nothing(self, *what: Any) -> None:
        pass

    numbers = epoch = accept = tokens = finish = ended = put = get = _nothing


class Router:
    """Belongs to the running event loop."""

    def __init__(
        self,
        journal: Journal | Oblivion,
        recoveries: Recoveries,
        send: Callable[[int, bytes], None],
        failed: Callable[[Exception], None],
        limits: Limits,
        max_tokens: int,
        max_wait: float,
        metrics: Metrics,
        ranks: int,
    ) -> None:
        """Requests that the journal knows go on. send: frames to the engine of an incarnation, if there is one.
        failed: the journal cannot be written, and nobody may hear of anything any more. limits: of one rank.
        max_tokens: of all requests. max_wait: seconds that a request may have to wait for its turn, as far as can be
        said when it comes. ranks: of a whole cluster."""
        self._journal, self._recoveries, self._send, self._failed = journal, recoveries, send, failed
        self.ledger = Ledger(
            lambda: int.from_bytes(os.urandom(8)),
            journal.first_number,
            max_tokens=max_tokens,
            # A few wait there for pages and rows to become free, the others here, where their turn is fair.
            at_once=limits.max_batch + max(2, limits.max_batch // 4),
            runs=limits.max_batch,
            block=limits.page_size,
            blocks=limits.num_pages,
        )
        self._metrics = metrics
        for entry in journal.unfinished:
            metrics.accepted(entry.key, time.monotonic())
        self._max_wait, self._pace, self._ranks, self._tile = max_wait, Pace(), ranks, limits.row_tile
        self._pace.began(time.monotonic())
        self.ledger.restore(journal.unfinished)
        self.members: dict[int, int] = {}  # rank: incarnation of those that may be given work
        self.bell = 0
        self._ringing = False
        self._listeners: dict[int, list[Listener]] = {entry.key: [] for entry in journal.unfinished}  # of open requests
        self._scores: dict[int, asyncio.Future[Score]] = {}  # by key

    # Clients

    def submit(
        self, request: Request, listener: Listener, owner: Owner = _NOBODY, priority: int = 0, patient: bool = False
    ) -> Entry:
        """As Coordinator.submit, for a request that has been checked. patient: however long it has to wait."""
        ended = None if self.ledger.find(request.request_id) else self._journal.ended(request.request_id)
        if ended is not None and ended.asked == request and ended.owner.name == owner.name:
            for event in ended.events():
                listener(event)
            return ended
        if not patient and self.ledger.find(request.request_id) is None:
            self._check_wait(owner, priority)
        if not self.ledger:
            self._pace.began(time.monotonic())
        entry, is_new = self.ledger.accept(request, owner, priority)
        if is_new:
            try:
                self.keep(lambda: self._journal.accept(entry))
            except BaseException:
                self.ledger.cancel(entry)
                raise
            self._metrics.accepted(entry.key, time.monotonic())
        for event in entry.events():
            listener(event)
        self._listeners.setdefault(entry.key, []).append(listener)
        self.place()
        return entry

    def _check_wait(self, owner: Owner, priority: int) -> None:
        wait = self._pace.wait(self._ahead(owner, priority))
        if wait > self._max_wait:
            self.ledger.counts.refused += 1
            raise QueueFull(f"queue: found {wait:.1f} s to wait, expected at most {self._max_wait:g}: try again later")

    def retry_after(self, owner: Owner) -> float:
        """Seconds until what waits now will have had its turn, if all goes on as it did."""
        return min(max(self._pace.wait(self._ahead(owner) + 1), 0.1), 60.0)

    def _ahead(self, owner: Owner, priority: int = 0) -> int:
        """How many a new request has to wait for. While nobody may be given work, as if all soon might: what was placed
        before waits for its place then."""
        return self.ledger.ahead(owner, priority, len(self.members) or self._ranks)

    def finish(self, entry: Entry) -> None:
        """Its text is complete, by a stop string of which the engine does not know."""
        self._leave(entry, self.ledger.finish(entry))

    def cancel(self, entry: Entry) -> None:
        """Forget it; nothing more is heard of it."""
        self._leave(entry, self.ledger.cancel(entry))

    async def score(self, token_ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """float32 [T, vocab] as LLM.score. Raises ValueError for what an engine refuses, QueueFull."""
        score = self.ledger.score(list(token_ids), chunk)
        done = self._scores[score.key] = asyncio.get_running_loop().create_future()
        self.place()
        try:
            return np.concatenate((await done).rows)
        finally:
            del self._scores[score.key]
            self._tell_to_cancel(self.ledger.cancel(score))

    def _leave(self, entry: Entry, told: tuple[Place, int] | None) -> None:
        if self._listeners.pop(entry.key, None) is not None:
            self.keep(lambda: self._journal.finish(entry))
        self._recoveries.ended(entry.key)
        self._tell_to_cancel(told)
        self._note_end(entry)
        self.place()

    def _note_end(self, entry: Entry) -> None:
        now, asked, reason = time.monotonic(), entry.asked, entry.finish_reason or "stop"
        if reason != "abort":
            self._pace.ended(now)
        tokens = len(entry.tokens)
        self._metrics.ended(entry.key, asked.request_id, entry.owner.name, reason, len(asked.token_ids), tokens, now)

    def _tell_to_cancel(self, told: tuple[Place, int] | None) -> None:
        if told is not None:
            self._send(told[0].incarnation, encode({"type": "cancel", "number": told[1]}))

    # Members

    def serve(self, members: Mapping[int, int], leavers: Collection[int]) -> int:
        """Work goes to these (rank: incarnation) from now on, and leaves `leavers`. Returns the rows of prompt tokens
        that one of them gets to compute now, of those the most."""
        self.members = dict(members)
        self.ledger.drain(leavers)
        for told in self.ledger.relieve(self.members):
            self._tell_to_cancel(told)
        return max(self.place().values(), default=0)

    def lost(self, rank: int, incarnation: int) -> None:
        """Its work waits for another place."""
        if self.members.get(rank) == incarnation:
            del self.members[rank]
        self.ledger.lost(rank, incarnation)

    def place(self) -> Counter[int]:
        """Send what waits to those who can serve it. Returns the rows that their prompts take, by rank."""
        rows: Counter[int] = Counter()
        if not self.members or not self.ledger.waiting:
            return rows
        for job in self.ledger.place(self.members):
            assert job.place is not None
            self._send(job.place.incarnation, encode(job.command()))
            self._metrics.placed(job.key, job.place.rank, time.monotonic())
            if isinstance(job, Entry):
                rows[job.place.rank] += -(-job.size // self._tile) * self._tile
        self.wake()
        return rows

    def wake(self) -> None:
        """Ring, once this turn of the loop is over."""
        if not self._ringing:
            self._ringing = True
            asyncio.get_running_loop().call_soon(self._ring)

    def next_bell(self) -> int:
        self.bell += 1
        return self.bell

    def _ring(self) -> None:
        """Once for all requests of this turn of the loop."""
        self._ringing = False
        frame = encode({"type": "bell", "bell": self.next_bell()})
        for incarnation in self.members.values():
            self._send(incarnation, frame)

    # Engines

    def take_events(self, incarnation: int, step: Step, packed: list[Any]) -> None:
        """A step's tokens: into the ledger, into the journal, to the clients."""
        taken = [t for p in packed if (t := self.ledger.take(step.rank, incarnation, p)) is not None]
        if not taken:
            return
        self.keep(lambda: self._keep_tokens(taken))
        now = time.monotonic()
        for entry, event in taken:
            listeners = self._listeners.get(entry.key)
            if listeners is None:
                continue  # its text ended with a token before this one
            self._recoveries.published(entry.key, now)
            self._metrics.token(entry.key, now, step)
            if event.finish_reason is not None:
                del self._listeners[entry.key]
                self._recoveries.ended(entry.key)
                self._note_end(entry)
            for listener in tuple(listeners):
                listener(event)
        self.place()

    def take_score(self, rank: int, incarnation: int, message: Message) -> None:
        body, rows = message.body, None
        if "shape" in body:
            rows = np.frombuffer(message.blob, np.float32).reshape(body["shape"])
        score = self.ledger.take_score(rank, incarnation, body["number"], rows)
        if score is not None:
            self.place()
        if score is not None and (done := self._scores.get(score.key)) is not None and not done.done():
            if "error" in body:
                done.set_exception(ValueError(body["error"]))
            else:
                done.set_result(score)

    def _keep_tokens(self, taken: list[tuple[Entry, TokenEvent]]) -> None:
        with self._journal.transaction():
            self._journal.tokens(taken)
            for entry, event in taken:
                if event.finish_reason is not None:
                    self._journal.finish(entry)

    def keep(self, write: Callable[[], None]) -> None:
        """Write to the journal. Raises sqlite3.Error, after saying `failed`."""
        try:
            write()
        except sqlite3.Error as e:
            self._failed(e)
            raise
