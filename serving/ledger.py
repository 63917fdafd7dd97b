"""The requests of a cluster: where each one is, and which tokens of it have been told to its client.

Pure decisions: no I/O, no time, no tasks, no JAX. It does not know which ranks live, what reaches them, or how text is
made of tokens.

A client's stream holds every token once, whatever is lost, late or said again, because of two rules. Each time a job is
placed, the engine there knows it by a new number, so that what is still on its way from where it was before finds no
taker. And of what comes from where it is, only the token of the next index is taken. The engine that a request moves to
is given the tokens taken so far and goes on from them: each token follows from the very tokens before it that the
client has.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_jax.request import FinishReason, Request, TokenEvent
from moe_jax.scheduler import QueueFull
from serving.admission import FairQueue, Owner, Prefixes, block_hashes
from serving.messages import PackedEvent, pack_request, unpack_event


class AlreadyExists(RuntimeError):
    """The request_id belongs to another request."""


class Place(NamedTuple):
    rank: int
    incarnation: int


class Load(NamedTuple):
    """What a place has to do."""

    jobs: int = 0
    tokens: int = 0  # known ones, of these


_IDLE = Load()
_NOBODY = Owner()
_DETOUR = 2  # jobs that a place may have more than the least loaded one, for a prompt whose beginning it knows


@dataclass(eq=False)
class Job:
    """Something that one rank at a time does."""

    key: int  # for its whole life, and never another's
    owner: Owner = field(default_factory=Owner, kw_only=True)
    priority: int = field(default=0, kw_only=True)  # 0 to admission.MAX_PRIORITY, which goes first
    number: int = field(default=0, init=False)  # what the engine at `place` knows it by
    place: Place | None = field(default=None, init=False)  # None: it waits for one
    begun: bool = field(default=False, init=False)  # something has come of it there
    ended: bool = field(default=False, init=False)

    @property
    def size(self) -> int:
        """Known tokens."""
        raise NotImplementedError

    @property
    def cost(self) -> int:
        """Tokens that it may take to compute, when it comes."""
        raise NotImplementedError

    @property
    def prompt(self) -> Sequence[int]:
        raise NotImplementedError

    def command(self) -> dict[str, Any]:
        """What the engine at `place` is to be told, as of now."""
        raise NotImplementedError

    def restart(self) -> None:
        """Drop what only the rank that had it could go on with."""


@dataclass(eq=False)
class Entry(Job):
    """A request, and what has come of it. Lists hold one element for each token of the output so far."""

    asked: Request  # as it came; its seed may be unset
    seed: int  # its own, or the one that was drawn for it
    tokens: array[int] = field(default_factory=lambda: array("i"))
    logprobs: array[float] = field(default_factory=lambda: array("d"))
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)  # as TokenEvent.top
    # What the engine said with the last token; "abort": cancelled. None also when the text ended it, by a stop string:
    # whoever makes text of the same tokens finds it again.
    finish_reason: FinishReason | None = None

    @property
    def size(self) -> int:
        return len(self.asked.token_ids) + len(self.tokens)

    @property
    def cost(self) -> int:
        return len(self.asked.token_ids) + self.asked.params.max_tokens

    @property
    def prompt(self) -> Sequence[int]:
        return self.asked.token_ids

    def command(self) -> dict[str, Any]:
        request = pack_request(self.number, self.asked)
        request |= {"params": request["params"] | {"seed": self.seed}, "output_ids": self.tokens.tolist()}
        return {"type": "add", "request": request}

    def attach(self, asked: Request, owner: Owner) -> Entry:
        """Itself, if that is what is asked for, by whom it belongs to. Raises AlreadyExists otherwise."""
        if asked != self.asked or owner.name != self.owner.name:
            raise AlreadyExists(
                f"request_id: found {asked.request_id!r}, which is in use with another prompt or other parameters, "
                f"expected a new one"
            )
        return self

    def append(self, event: TokenEvent) -> None:
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)
        self.tops.append(event.top)
        self.finish_reason = event.finish_reason

    def events(self, start: int = 0) -> list[TokenEvent]:
        """The tokens from index `start` on, as they were taken."""
        request_id, last = self.asked.request_id, len(self.tokens) - 1
        return [
            TokenEvent(
                request_id, i, self.tokens[i], self.logprobs[i], self.tops[i], self.finish_reason if i == last else None
            )
            for i in range(start, last + 1)
        ]


@dataclass(eq=False)
class Score(Job):
    """Log-probabilities of a prompt. Whoever takes it over begins at the first token."""

    token_ids: Sequence[int]
    chunk: int | None = None  # as in LLM.score
    rows: list[np.ndarray] = field(default_factory=list)  # float32 [some, vocab] each, in the order of the tokens

    @property
    def size(self) -> int:
        return len(self.token_ids)

    @property
    def cost(self) -> int:
        return len(self.token_ids)

    @property
    def prompt(self) -> Sequence[int]:
        return self.token_ids

    def command(self) -> dict[str, Any]:
        return {"type": "score", "number": self.number, "token_ids": list(self.token_ids), "chunk": self.chunk}

    def restart(self) -> None:
        self.rows.clear()


@dataclass
class Counts:
    """Since the ledger was made."""

    accepted: int = 0  # requests
    finished: int = 0  # requests, by their engine or by their text
    cancelled: int = 0  # jobs
    moved: int = 0  # times that a job had to leave its rank
    tokens: int = 0  # taken
    prompt_tokens: int = 0  # of accepted requests
    refused: int = 0  # at a bound
    # Token events that were dropped:
    stale: int = 0  # of what is not, or no longer, placed where they come from
    repeated: int = 0
    gaps: int = 0  # one before it is missing. A defect: the request waits for that one for as long as it stays there.


class Ledger:
    """All jobs that have not ended.

    draw_seed: gives a uint64, for a request that comes without.
    first_number: keys and numbers are drawn from here on. No engine and no journal may know of one of them already.
    max_jobs, max_tokens: bounds of what is here, checked when something new comes. Tokens are of prompts and outputs.
    at_once: jobs that one place is given at most, and the others wait here, where their turn is fair; 0: no bound.
    runs: how many of them it works on, while the rest waits there; 0: all.
    block: tokens that a rank's cache shares as a whole. blocks: how many it holds.
    """

    def __init__(
        self,
        draw_seed: Callable[[], int],
        first_number: int = 1,
        max_jobs: int = 4096,
        max_tokens: int = 1 << 22,
        at_once: int = 0,
        runs: int = 0,
        block: int = 16,
        blocks: int = 1 << 12,
    ) -> None:
        self.max_jobs, self.max_tokens, self.at_once, self.runs = max_jobs, max_tokens, at_once, runs
        self._block, self._blocks = block, blocks
        self.tokens = 0  # known ones, of all jobs
        self.counts = Counts()
        self._draw_seed, self._next = draw_seed, first_number
        self._jobs: dict[int, Job] = {}  # by key
        self._waiting: FairQueue[int] = FairQueue()  # keys of those without a place
        self._owners: dict[str, Load] = {}  # what is open of each owner's
        self._prefixes: dict[Place, Prefixes] = {}
        self._placed: dict[int, Job] = {}  # the others, by number
        self._by_id: dict[str, Entry] = {}
        self._loads: dict[Place, Load] = {}  # of places that have something to do

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Jobs without a place."""
        return len(self._waiting)

    def ahead(self, owner: Owner, priority: int = 0, places: int = 1) -> int:
        """Of them, those that a new one has to wait for, because so many places have no room for all of them."""
        room = places * self.at_once - len(self._placed)
        return max(0, self._waiting.ahead(owner, priority) - max(0, room)) if self.at_once else 0

    def load(self, place: Place) -> Load:
        return self._loads.get(place, _IDLE)

    def find(self, request_id: str) -> Entry | None:
        """The request of this id, unless it has ended."""
        return self._by_id.get(request_id)

    # Coming

    def accept(self, asked: Request, owner: Owner = _NOBODY, priority: int = 0) -> tuple[Entry, bool]:
        """(the request's entry, whether it is new). A new one waits for `place`; one that is known is attached to.

        Raises AlreadyExists for the id of another request, QueueFull at a bound, ValueError for output_ids.
        """
        if asked.output_ids:
            raise ValueError(f"output_ids: found {len(asked.output_ids)} tokens, expected none in a new request")
        known = self._by_id.get(asked.request_id)
        if known is not None:
            return known.attach(asked, owner), False
        self._check_room(len(asked.token_ids), owner)
        seed = self._draw_seed() if asked.params.seed is None else asked.params.seed
        entry = Entry(self._draw(), asked, seed, owner=owner, priority=priority)
        self.restore([entry])
        self.counts.accepted += 1
        self.counts.prompt_tokens += len(asked.token_ids)
        return entry, True

    def restore(self, entries: Iterable[Entry]) -> None:
        """Take requests in that were accepted in another life. They wait for `place`; no bound applies.

        Raises ValueError for one that has ended, or that is here.
        """
        for entry in entries:
            request_id = entry.asked.request_id
            if entry.ended or request_id in self._by_id or entry.key in self._jobs:
                raise ValueError(f"restore: found {request_id!r}, which has ended or is here, expected neither")
            self._by_id[request_id] = entry
            self._admit(entry)

    def score(self, token_ids: Sequence[int], chunk: int | None = None) -> Score:
        """A new job, which waits for `place`. Raises QueueFull at a bound."""
        self._check_room(len(token_ids), _NOBODY)
        score = Score(self._draw(), token_ids, chunk)
        self._admit(score)
        return score

    def _check_room(self, tokens: int, owner: Owner) -> None:
        open_ = self._owners.get(owner.name, _IDLE)
        why = None
        if len(self._jobs) >= self.max_jobs:
            why = f"queue: found {len(self._jobs)} requests, expected fewer"
        elif self.tokens + tokens > self.max_tokens:
            why = f"queue: found {self.tokens} tokens and {tokens} more, expected at most {self.max_tokens}"
        elif open_.jobs >= owner.max_requests:
            why = f"key {owner.name!r}: found {open_.jobs} requests open, expected fewer than {owner.max_requests}"
        elif open_.tokens + tokens > owner.max_tokens:
            found = f"{open_.tokens} tokens open and {tokens} more"
            why = f"key {owner.name!r}: found {found}, expected at most {owner.max_tokens}"
        if why is not None:
            self.counts.refused += 1
            raise QueueFull(f"{why}: try again later")

    def _admit(self, job: Job) -> None:
        self._jobs[job.key] = job
        self._waiting.push(job.key, job.owner, job.cost, job.priority)
        self.tokens += job.size
        self._change_open(job, 1)

    def _change_open(self, job: Job, count: int) -> None:
        """Of its owner; prompts only, for their number stays."""
        name, was = job.owner.name, self._owners.get(job.owner.name, _IDLE)
        self._owners[name] = Load(was.jobs + count, was.tokens + count * len(job.prompt))
        if not self._owners[name].jobs:
            del self._owners[name]

    def _draw(self) -> int:
        self._next += 1
        return self._next - 1

    # Places

    def place(self, incarnations: Mapping[int, int]) -> list[Job]:
        """Give waiting jobs, in the order of serving.admission, to these ranks (rank: incarnation) that have room.

        Each goes to one that begins with it at once, if there is any; of these to the least loaded one: by jobs, then
        by tokens, then the lowest rank; or to one that is a little more loaded and has had the beginning of its prompt.
        Those that had to leave their rank, or come from another life with tokens, are spread by what has to be
        prefilled before they go on, though the ranks' loads differ: somebody waits for their next token. Returns the
        jobs: `command()` is to reach the engine at `place` before anything else about them does. Without ranks they go
        on waiting.
        """
        prefill: Counter[Place] = Counter()  # tokens of those that had to leave their rank
        places = [Place(rank, incarnation) for rank, incarnation in incarnations.items()]
        if self._prefixes.keys() - places:
            self._prefixes = {place: known for place, known in self._prefixes.items() if place in places}
        jobs: list[Job] = []
        while self._waiting:
            free = [place for place in places if not self.at_once or self.load(place).jobs < self.at_once]
            if not free:
                break
            free = [place for place in free if self._room(place)] or free
            key = self._waiting.pop()
            assert key is not None
            job = self._jobs[key]
            if job.number or job.size > len(job.prompt):
                job.place = min(free, key=lambda place: (prefill[place], self.load(place), place))
                prefill[job.place] += job.size
            else:
                job.place = self._choose(job, free)
            job.number, job.begun = self._draw(), False
            self._placed[job.number] = job
            self._change_load(job.place, 1, job.size)
            jobs.append(job)
        return jobs

    def _room(self, place: Place) -> int:
        """How many more jobs it would work on."""
        return max(0, self.runs - self.load(place).jobs) if self.runs else self.max_jobs

    def _choose(self, job: Job, places: Sequence[Place]) -> Place:
        hashes = block_hashes(job.prompt, self._block)
        if not hashes:
            return min(places, key=lambda place: (self.load(place), place))
        most = min(self.load(place).jobs for place in places) + _DETOUR
        known = {place: self._prefixes.setdefault(place, Prefixes(self._blocks)) for place in places}
        near = [place for place in places if self.load(place).jobs <= most]
        best = min(near, key=lambda place: (-known[place].matched(hashes), self.load(place), place))
        known[best].note(hashes)
        return best

    def lost(self, rank: int, incarnation: int) -> list[Job]:
        """The engine of this incarnation is gone. Returns the jobs it had; they wait for `place`."""
        return self._move(lambda place: place == (rank, incarnation))

    def drain(self, ranks: Collection[int]) -> list[Job]:
        """These ranks have left at the switch to an epoch. Returns the jobs they had; they wait for `place`."""
        return self._move(lambda place: place.rank in ranks)

    def relieve(self, incarnations: Mapping[int, int]) -> list[tuple[Place, int]]:
        """Of these ranks (rank: incarnation) some have come: take back what has not begun where there is more than is
        worked on, the last first, as far as it would begin at once elsewhere. Returns (place, number) of each, that is
        to be told to cancel; they wait for `place`.
        """
        places = [Place(rank, incarnation) for rank, incarnation in incarnations.items()]
        room, told = sum(map(self._room, places)), []
        for place in places:
            excess = min(self.load(place).jobs - self.runs, room) if self.runs else 0
            if excess > 0:
                waiting = [job for job in reversed(self._placed.values()) if job.place == place and not job.begun]
                told += [(place, job.number) for job in waiting[:excess]]
                room -= len(waiting[:excess])
                self._take_back(waiting[:excess])
        return told

    def _move(self, leaves: Callable[[Place], bool]) -> list[Job]:
        jobs = [job for job in self._placed.values() if job.place is not None and leaves(job.place)]
        self._take_back(jobs)
        return jobs

    def _take_back(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._withdraw(job)
            job.restart()
            self._waiting.push_back(job.key, job.key)
        self.counts.moved += len(jobs)

    def _withdraw(self, job: Job) -> tuple[Place, int] | None:
        """Take a job from its place. (place, number) of before; None if it was waiting."""
        if job.place is None:
            self._waiting.remove(job.key)
            return None
        before = job.place, job.number
        del self._placed[job.number]
        self._change_load(job.place, -1, -job.size)
        job.place = None
        return before

    def _change_load(self, place: Place, jobs: int, tokens: int) -> None:
        load = self.load(place)
        self._loads[place] = load = Load(load.jobs + jobs, load.tokens + tokens)
        if not load.jobs:
            del self._loads[place]  # incarnations come and go for ever

    # Results

    def take(self, rank: int, incarnation: int, packed: PackedEvent) -> tuple[Entry, TokenEvent] | None:
        """A token, as the engine of this incarnation told it. None: it is dropped, see Counts.

        One by one, because the text of a token may `finish` its request, and then what follows in the same message
        counts for nothing. A request ends with its last token and is no longer here.
        """
        number, index = packed[0], packed[1]
        entry, place = self._placed.get(number), Place(rank, incarnation)
        if not isinstance(entry, Entry) or entry.place != place:
            self.counts.stale += 1
            return None
        if index != len(entry.tokens):
            self.counts.repeated += index < len(entry.tokens)
            self.counts.gaps += index > len(entry.tokens)
            return None
        event = unpack_event(packed, entry.asked.request_id)
        entry.append(event)
        entry.begun = True
        self.tokens += 1
        self.counts.tokens += 1
        self._change_load(place, 0, 1)
        if event.finish_reason is not None:
            self.finish(entry)
        return entry, event

    def take_score(self, rank: int, incarnation: int, number: int, rows: np.ndarray | None) -> Score | None:
        """The next rows of a score; None is its end. Returns the score when it has ended with that."""
        score = self._placed.get(number)
        if not isinstance(score, Score) or score.place != (rank, incarnation):
            return None
        if rows is not None:
            score.rows.append(rows)
            score.begun = True
            return None
        self._remove(score)
        return score

    # Going

    def finish(self, entry: Entry) -> tuple[Place, int] | None:
        """Its output is complete: the text has come to a stop string, of which no engine knows. Returns as `cancel`."""
        self.counts.finished += not entry.ended
        return self._remove(entry)

    def cancel(self, job: Job) -> tuple[Place, int] | None:
        """Forget a job. Returns (place, number) that is to be told to cancel, None if there is none.

        Nothing happens to one that has ended.
        """
        if not job.ended:
            self.counts.cancelled += 1
            if isinstance(job, Entry):
                job.finish_reason = "abort"
        return self._remove(job)

    def _remove(self, job: Job) -> tuple[Place, int] | None:
        if job.ended:
            return None
        job.ended = True
        told = self._withdraw(job)
        del self._jobs[job.key]
        self.tokens -= job.size
        self._change_open(job, -1)
        if isinstance(job, Entry):
            del self._by_id[job.asked.request_id]
        return told
