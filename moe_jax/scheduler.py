"""Which tokens of which requests one rank computes in the next step.

Pure decisions: a queue, the running sequences and their pages, and nothing else. This module must not know the
model, the device, other ranks, or how steps are agreed; it is told how many rows a step has and fills them.

A step is a list of tiles of `row_tile` rows. Decode rows come first, one per sequence, packed and padded up to a
whole tile; then prefill tiles, each belonging to one sequence.

    plan = scheduler.schedule(rows, prefill)     # … run it, with scheduler.wish() riding on it …
    events = scheduler.complete(plan, tokens)    # after its K/V were written; or scheduler.discard(plan)

A second plan may be made while the first is in flight (`can_look_ahead`). It takes for granted that the first one
succeeds and that its tokens stop nobody; what it decodes then are tokens that are not known yet, named by their place
among those that the first one samples. A sequence that does stop has been computed once in vain.

Sequences run in the order of arrival. When pages run out the youngest running one is preempted: it gives up its
pages, keeps its tokens, returns to the front of the queue and is prefilled again. Nobody preempts an older one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from moe_jax.config import EngineConfig
from moe_jax.kv_cache import PagePool, extend_digests
from moe_jax.request import Request, TokenEvent

Sampled = tuple[int, float, Seq[tuple[int, float]]]  # token, its log-probability, the top (token, log-probability)


class QueueFull(RuntimeError):
    """The queue holds as many tokens as it may: try again later, or elsewhere."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Limits:
    """What one rank can hold. Rows, tokens and pages are counts; raises ValueError for values that cannot work."""

    page_size: int  # tokens
    num_pages: int
    max_batch: int  # running sequences, a multiple of row_tile
    max_prefill_rows: int  # prefill rows in one step, a multiple of row_tile
    max_model_len: int  # prompt and output tokens of one request
    row_tile: int = 16
    max_waiting_tokens: int = 1 << 22  # known tokens of all queued requests

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected an integer >= 1")
        for name in ("max_batch", "max_prefill_rows"):
            if getattr(self, name) % self.row_tile:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a multiple of {self.row_tile}")
        if self.max_model_len < 2:
            raise ValueError("max_model_len: found 1, expected at least 2, a prompt token and an output token")
        if self.max_waiting_tokens < self.max_model_len:
            raise ValueError(
                f"max_waiting_tokens: found {self.max_waiting_tokens}, expected at least max_model_len, "
                f"{self.max_model_len}, or the longest request could never be queued"
            )

    @staticmethod
    def of(c: EngineConfig) -> Limits:
        return Limits(c.page_size, c.num_pages, c.max_batch, c.max_prefill_rows, c.max_model_len, c.row_tile)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could never be served here, or that has already ended."""
        outputs = request.output_ids
        if len(request.token_ids) > self.max_model_len - 1:
            raise ValueError(
                f"prompt: found {len(request.token_ids)} tokens, expected at most {self.max_model_len - 1} "
                f"(max_model_len - 1)"
            )
        limit = request.output_limit(self.max_model_len)
        reason = request.finish_reason(outputs[-1], len(outputs), self.max_model_len) if outputs else None
        if reason is not None:
            raise ValueError(
                f"output_ids: found {len(outputs)} tokens that end the request ({reason!r}), "
                f"expected fewer than {limit} and none that stops it"
            )
        most = ceil_div(len(request.token_ids) + limit - 1, self.page_size)  # the last token's K/V are not needed
        if most > self.num_pages:
            raise ValueError(
                f"prompt + max_tokens: found {len(request.token_ids)} + {limit} tokens, which take {most} pages, "
                f"expected at most the pool's {self.num_pages} pages of {self.page_size} tokens"
            )


@dataclass(eq=False)
class Sequence:
    """A request on this rank: its tokens, and how far their K/V have been computed."""

    request: Request
    token_ids: list[int]  # prompt and output
    pages: list[int] = field(default_factory=list)  # the block table: token i is in pages[i // page_size]
    num_computed: int = 0  # tokens whose K/V are written
    scheduled: int = 0  # tokens that the plans in flight compute
    sampled: int = 0  # tokens that they add
    plans: int = 0  # of those in flight, how many it is in
    ended: bool = False  # finished or cancelled; dropped when the last plan that it is in ends
    digests: list[bytes] = field(default_factory=list)  # of its full pages, filled in as needed

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.request.token_ids) :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def next_start(self) -> int:
        """The first token that no plan has computed."""
        return self.num_computed + self.scheduled

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled, as if the plans in flight succeed. One for a running
        sequence means decode."""
        return len(self.token_ids) + self.sampled - self.next_start


@dataclass
class Entry:
    """A sequence's share of a step: tokens start..start+count-1 in rows first_row..first_row+count-1."""

    sequence: Sequence
    start: int
    count: int
    first_row: int
    sample: bool  # the last row's logits give the next token
    is_decode: bool
    after: int | None = None  # its token is the one that the plan before samples at this place; None: it is known

    @property
    def sample_row(self) -> int:
        return self.first_row + self.count - 1

    @property
    def sample_position(self) -> int:
        """Absolute position of the token to be produced, the one that sampling noise is drawn for."""
        return self.start + self.count


@dataclass(eq=False)
class StepPlan:
    """What one rank computes in one step. May be empty: other ranks may have work."""

    entries: list[Entry] = field(default_factory=list)  # by first_row
    decode_rows: int = 0  # not padded
    rows: int = 0  # padded to whole tiles, decode and prefill together

    @property
    def sampled(self) -> list[Entry]:
        """The entries that `Scheduler.complete` wants a token for, in its order."""
        return [entry for entry in self.entries if entry.sample]


@dataclass(frozen=True)
class Stats:
    """A moment's gauges, and counters since the scheduler was built."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    prefix_hit_tokens: int
    preemptions: int


class Scheduler:
    """One rank's queue, running sequences and pages."""

    def __init__(self, limits: Limits, prefix_caching: bool = True) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages, limits.page_size, prefix_caching)
        self._sequences: dict[str, Sequence] = {}  # all that are neither finished nor cancelled
        self._waiting: deque[Sequence] = deque()  # oldest first, and all younger than the running ones
        self._waiting_tokens = 0
        self._running: list[Sequence] = []  # oldest first; these hold pages
        self._in_flight: deque[StepPlan] = deque()  # oldest first, at most two
        self._prefix_hit_tokens = 0
        self._preemptions = 0

    # Requests

    def add(self, request: Request, accepted: bool = False) -> None:
        """Queue a request. `accepted`: a client already relies on it (it moves here), so the queue's bound is waived.

        Raises QueueFull; and ValueError when its id is taken, it has already ended, or it can never fit.
        """
        limits, length = self.limits, len(request.token_ids) + len(request.output_ids)
        if request.request_id in self._sequences:
            raise ValueError(f"request_id: found {request.request_id!r}, which is being served, expected a new one")
        limits.check(request)
        if not accepted and self._waiting_tokens + length > limits.max_waiting_tokens:
            raise QueueFull(
                f"queue: found {self._waiting_tokens} tokens waiting and {length} more, "
                f"expected at most {limits.max_waiting_tokens}: try again later"
            )
        sequence = Sequence(request, [*request.token_ids, *request.output_ids])
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        self._waiting_tokens += length

    def cancel(self, request_id: str) -> bool:
        """Forget a request; False if it is not here. No event of it follows, those of plans in flight included.

        Its pages are free at once, or when no plan in flight writes to them any more.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.plans:
            sequence.ended = True
        elif sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
            self._waiting_tokens -= len(sequence.token_ids)
        return True

    @property
    def request_ids(self) -> list[str]:
        """Of all that are neither finished nor cancelled, oldest first."""
        return list(self._sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self.pool.num_used,
            pages_total=self.pool.num_pages,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._preemptions,
        )

    # Wishes

    def wish(self) -> tuple[int, bool]:
        """(rows wanted for the next step, whether some of them are prefill); (0, False) when there is nothing to do.

        With a plan in flight the next step is the one after it, as if it succeeds and its tokens stop nobody early;
        requests added later ride on the wish after that. Rows are whole tiles. An estimate,
        but not one that stalls: while there is work it is not (0, False), and a step as wished places some of it.
        """
        tile, running = self.limits.row_tile, 0
        decode_rows, budget = 0, self.limits.max_prefill_rows
        for sequence in self._running:
            if not self._goes_on(sequence):
                continue
            running += 1
            if sequence.remaining == 1:
                decode_rows += 1
            else:
                budget -= min(ceil_div(sequence.remaining, tile) * tile, budget)
        available, held = self.pool.num_available, running
        for sequence in self._waiting:
            reused, cost = self._admission(sequence)
            # With nothing left running every page will be free, whatever the plan in flight still holds.
            if budget <= 0 or running >= self.limits.max_batch or (cost + held > available and running > 0):
                break
            available, held, running = available - cost, held + 1, running + 1
            budget -= min(ceil_div(len(sequence.token_ids) - reused, tile) * tile, budget)
        prefill_rows = self.limits.max_prefill_rows - budget
        return ceil_div(decode_rows, tile) * tile + prefill_rows, prefill_rows > 0

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether a running sequence may need another step after the plans in flight; False if it is certain to end."""
        limit = sequence.request.output_limit(self.limits.max_model_len)
        return not sequence.ended and sequence.num_output + sequence.sampled < limit

    # Steps

    @property
    def can_look_ahead(self) -> bool:
        """Whether a second plan can be made now: there is one in flight, and nobody need be preempted for the next."""
        if len(self._in_flight) != 1:
            return False
        size, needed = self.limits.page_size, 0
        for sequence in self._running:
            if self._goes_on(sequence):
                end = sequence.next_start + min(sequence.remaining, self.limits.max_prefill_rows)
                needed += max(0, ceil_div(end, size) - len(sequence.pages))
        return needed <= self.pool.num_available

    def schedule(self, rows: int, prefill: bool) -> StepPlan:
        """Fill a step of `rows` rows; without `prefill` only its decode rows. An empty plan is legal.

        Any number of rows will do, fewer or more than wished for. Raises RuntimeError when a plan is in flight and
        cannot be looked beyond, and ValueError for negative rows.
        """
        if self._in_flight and not self.can_look_ahead:
            raise RuntimeError("schedule: found a plan in flight, expected complete() or discard() of it first")
        limits, plan = self.limits, StepPlan()
        places = {e.sequence: i for p in self._in_flight for i, e in enumerate(p.sampled)}
        if rows < 0:
            raise ValueError(f"rows: found {rows}, expected at least 0")
        rows -= rows % limits.row_tile
        running = sum(map(self._goes_on, self._running))  # before any is placed: the last token takes its place, too
        # Preemption in this loop removes only later sequences, which a list's iterator allows.
        for sequence in self._running:
            ready = plan.decode_rows < rows and sequence.remaining == 1 and self._goes_on(sequence)
            if ready and self._grow(sequence, 1):
                self._place(plan, sequence, 1, plan.decode_rows, is_decode=True, after=places.get(sequence))
                plan.decode_rows += 1
        # Neighbours visit their pages together, so sequences of like length belong together.
        plan.entries.sort(key=lambda e: e.start)
        for row, entry in enumerate(plan.entries):
            entry.first_row = row
        plan.rows = ceil_div(plan.decode_rows, limits.row_tile) * limits.row_tile
        if prefill:
            self._schedule_prefill(plan, min(rows, plan.rows + limits.max_prefill_rows), running)
        self._in_flight.append(plan)
        return plan

    def _schedule_prefill(self, plan: StepPlan, rows: int, running: int) -> None:
        """Fill the plan's rows up to `rows`, in order of arrival: nobody starts while an older one is stuck. running:
        how many are in this plan or the next."""
        for sequence in self._running:
            if sequence.remaining > 1 and not sequence.ended and not self._place_chunk(plan, sequence, rows):
                return
        while self._waiting and plan.rows < rows and running < self.limits.max_batch:
            sequence = self._waiting[0]
            reused, cost = self._admission(sequence)
            # Room for all its tokens and a page for each running sequence, or it would soon be preempted again.
            if cost + running > self.pool.num_available:
                return
            self._waiting.popleft()
            self._waiting_tokens -= len(sequence.token_ids)
            self._running.append(sequence)
            running += 1
            sequence.pages = self.pool.match(self._reusable(sequence))
            sequence.num_computed = reused
            self._prefix_hit_tokens += reused
            if not self._place_chunk(plan, sequence, rows):
                return

    def _place_chunk(self, plan: StepPlan, sequence: Sequence, rows: int) -> bool:
        """Place as much of its prefill as rows and pages allow. Whether that was all of it."""
        wanted = sequence.remaining
        count = self._grow(sequence, min(wanted, rows - plan.rows))
        if count:
            self._place(plan, sequence, count, plan.rows, is_decode=False)
            plan.rows += ceil_div(count, self.limits.row_tile) * self.limits.row_tile
        return count == wanted

    def _place(
        self,
        plan: StepPlan,
        sequence: Sequence,
        count: int,
        first_row: int,
        is_decode: bool,
        after: int | None = None,
    ) -> None:
        sample = count == sequence.remaining
        plan.entries.append(Entry(sequence, sequence.next_start, count, first_row, sample, is_decode, after))
        sequence.scheduled += count
        sequence.sampled += sample
        sequence.plans += 1

    def complete(self, plan: StepPlan, tokens: Seq[Sampled]) -> list[TokenEvent]:
        """The step happened and its K/V are written: `tokens` holds one (token, log-probability, top) per plan.sampled.

        Returns the new tokens' events, in the same order, without those of ended requests. Raises ValueError for
        a wrong number of tokens and RuntimeError when it is not the oldest plan in flight; nothing has changed then.
        """
        if not self._in_flight or plan is not self._in_flight[0]:
            raise RuntimeError("complete: found a plan that is not in flight, expected the oldest that is")
        if len(tokens) != len(plan.sampled):
            raise ValueError(f"tokens: found {len(tokens)}, expected {len(plan.sampled)}, one per sampled entry")
        self._in_flight.popleft()
        events: list[TokenEvent] = []
        results = iter(tokens)
        for entry in plan.entries:
            sequence, result = entry.sequence, next(results) if entry.sample else None
            sequence.num_computed += entry.count
            if not sequence.ended:
                self._publish(entry)
                if result is not None:
                    events.append(self._append(sequence, *result))
        self._end(plan)
        return events

    def discard(self, plan: StepPlan) -> None:
        """The step failed: nothing of it happened, and the same work is scheduled again later. A plan made after it
        goes with it.

        Raises RuntimeError when the plan is not in flight.
        """
        if plan not in self._in_flight:
            raise RuntimeError("discard: found a plan that is not in flight, expected one that is")
        last = None
        while last is not plan:
            last = self._in_flight.pop()
            self._end(last)

    def _append(self, sequence: Sequence, token: int, logprob: float, top: Seq[tuple[int, float]]) -> TokenEvent:
        request, index = sequence.request, sequence.num_output
        sequence.token_ids.append(token)
        reason = request.finish_reason(token, index + 1, self.limits.max_model_len)
        if reason is not None:
            del self._sequences[request.request_id]
            sequence.ended = True
        return TokenEvent(request.request_id, index, token, logprob, tuple(top), reason)

    def _publish(self, entry: Entry) -> None:
        """Let others find the pages that the entry filled."""
        sequence, size = entry.sequence, self.limits.page_size
        if self.pool.prefix_caching:
            extend_digests(sequence.digests, sequence.token_ids, size)
            for page in range(entry.start // size, sequence.num_computed // size):
                self.pool.publish(sequence.pages[page], sequence.digests[page])

    def _end(self, plan: StepPlan) -> None:
        """The plan is out of flight; drop the sequences that have ended and are in no other."""
        for entry in plan.entries:
            sequence = entry.sequence
            sequence.scheduled -= entry.count
            sequence.sampled -= entry.sample
            sequence.plans -= 1
            if sequence.ended and not sequence.plans:
                self._running.remove(sequence)
                self._release(sequence)

    # Pages

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Get pages for the next `count` tokens, preempting younger sequences. How many tokens there is room for.

        A sequence that gets no room keeps what it has and waits: only an older one may take its pages.
        """
        size = self.limits.page_size
        while len(sequence.pages) * size < sequence.next_start + count:
            if not self.pool.num_available and not self._preempt_younger(sequence):
                return len(sequence.pages) * size - sequence.next_start
            if self.pool.num_available:  # a victim whose pages are all shared frees none
                sequence.pages.append(self.pool.allocate())
        return count

    def _preempt_younger(self, sequence: Sequence) -> bool:
        """Preempt the youngest running sequence; False if that is this one.

        The victim is in no plan. Not in this one: decodes are placed oldest first, and a prefill that still lacks
        pages is the youngest, because nobody is admitted behind it before it got all it needs. Nor in one in flight:
        nobody looks ahead when that would preempt anyone.
        """
        if self._running[-1] is sequence:
            return False
        victim = self._running.pop()
        self._release(victim)
        self._waiting.appendleft(victim)
        self._waiting_tokens += len(victim.token_ids)
        self._preemptions += 1
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed = [], 0

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Digests of the pages it may take from the cache: not its last token's, whose logits are needed."""
        if not self.pool.prefix_caching:
            return []
        extend_digests(sequence.digests, sequence.token_ids, self.limits.page_size)
        return sequence.digests[: (len(sequence.token_ids) - 1) // self.limits.page_size]

    def _admission(self, sequence: Sequence) -> tuple[int, int]:
        """(tokens found in the prefix cache, available pages that holding all its tokens would take)."""
        hits = self.pool.find(self._reusable(sequence))
        shared = sum(self.pool.references(page) > 0 for page in hits)
        return len(hits) * self.limits.page_size, ceil_div(len(sequence.token_ids), self.limits.page_size) - shared
