"""The ledger alone, and in histories: ranks that are lost, come back, drain, talk late, twice, or after their death."""

import itertools
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.request import Request, SamplingParams, TokenEvent
from moe_jax.scheduler import Limits, QueueFull
from serving.ledger import AlreadyExists, Entry, Ledger, Load, Place
from serving.messages import unpack_request

LIMITS = Limits(page_size=4, num_pages=64, max_batch=16, max_prefill_rows=16, max_model_len=40)


def new_ledger(**options):
    return Ledger(lambda: 77, **options)


def asked(request_id="a", prompt=(1, 2, 3), **params):
    return Request(request_id, prompt, SamplingParams(**{"seed": 5, **params}))


def placed(ledger, *args, **params) -> Entry:
    """A request, on rank 0 of incarnation 1."""
    entry, _ = ledger.accept(asked(*args, **params))
    assert ledger.place({0: 1}) == [entry]
    return entry


def told(entry, index, reason=None, token=9):
    return [entry.number, index, token, -0.5, [[token, -0.5]], reason]


# One at a time


def test_attaches_to_what_is_the_same():
    ledger = new_ledger()
    entry, is_new = ledger.accept(asked(stop=["x"], seed=None))
    assert is_new and entry.seed == 77
    assert ledger.accept(asked(stop="x", seed=None)) == (entry, False)
    for other in (asked(stop="x", seed=77), asked(prompt=(1, 2)), asked(stop="x", seed=None, max_tokens=3)):
        with pytest.raises(AlreadyExists, match="found 'a', .*expected a new one"):
            ledger.accept(other)
    assert ledger.find("a") is entry and ledger.find("b") is None
    ledger.cancel(entry)
    assert ledger.find("a") is None and ledger.accept(asked())[1]


def test_bounds():
    ledger = new_ledger(max_jobs=2, max_tokens=7)
    entry = placed(ledger)
    for i in range(2):
        ledger.take(0, 1, told(entry, i))
    with pytest.raises(QueueFull, match="found 5 tokens and 3 more, expected at most 7"):
        ledger.accept(asked("b"))
    with pytest.raises(QueueFull):
        ledger.score([1, 2, 3])
    assert ledger.accept(asked()) == (entry, False)  # known, so it takes no room
    ledger.accept(asked("b", [1]))
    with pytest.raises(QueueFull, match="found 2 requests"):
        ledger.accept(asked("c", [1]))
    with pytest.raises(ValueError, match="output_ids"):
        ledger.accept(Request("d", [1], SamplingParams(), output_ids=[2]))
    ledger.cancel(entry)
    assert ledger.tokens == 1 and len(ledger) == 1


def test_only_the_next_token_and_only_from_where_it_is():
    ledger = new_ledger()
    entry = placed(ledger)
    accepted = ledger.take(0, 1, told(entry, 0))
    assert accepted is not None and accepted[0] is entry and accepted[1] == entry.events()[0]
    assert ledger.take(0, 1, told(entry, 0)) is None  # said again
    assert ledger.take(0, 1, told(entry, 2)) is None  # token 1 is missing
    assert ledger.take(0, 2, told(entry, 1)) is None  # another life of the rank
    assert ledger.take(1, 1, told(entry, 1)) is None
    assert ledger.take(0, 1, [10**6, 0, 9, -0.5, [], None]) is None
    before = told(entry, 1)
    assert ledger.lost(0, 2) == [] and ledger.lost(0, 1) == [entry]
    assert ledger.take(0, 1, before) is None  # waiting
    assert ledger.place({0: 1}) == [entry]
    assert ledger.take(0, 1, before) is None  # back on the very same place, and still known apart
    assert ledger.take(0, 1, told(entry, 1, "length")) is not None
    assert entry.ended and entry.finish_reason == "length" and len(ledger) == ledger.tokens == 0
    assert ledger.take(0, 1, told(entry, 1, "length")) is None
    counts = ledger.counts
    assert (counts.stale, counts.repeated, counts.gaps) == (6, 1, 1)
    assert (counts.tokens, counts.finished, counts.moved) == (2, 1, 1)


def test_a_moved_request_goes_on_after_its_tokens_and_keeps_them():
    ledger = new_ledger()
    entry = placed(ledger, seed=None, stop=["x"], logprobs=2)
    first = entry.command()["request"]
    assert unpack_request(first) == Request(str(entry.number), (1, 2, 3), entry.asked.params.with_seed(77))
    ledger.take(0, 1, told(entry, 0, token=11))
    ledger.take(0, 1, told(entry, 1, token=12))
    ledger.lost(0, 1)
    assert ledger.place({}) == [] and ledger.waiting == 1
    ledger.place({0: 3})
    again = unpack_request(entry.command()["request"])
    assert again.output_ids == (11, 12) and again.params == entry.asked.params.with_seed(77)
    assert again.request_id == str(entry.number) != first["request_id"]
    ledger.take(0, 3, told(entry, 2, "stop", token=13))
    assert [(e.index, e.token, e.logprob, e.top, e.finish_reason) for e in entry.events(1)] == [
        (1, 12, -0.5, ((12, -0.5),), None),
        (2, 13, -0.5, ((13, -0.5),), "stop"),
    ]


def test_what_ends_and_who_is_told():
    ledger = new_ledger()
    waiting, _ = ledger.accept(asked("waiting"))
    assert ledger.cancel(waiting) is None and ledger.place({0: 1}) == []
    entry = placed(ledger)
    assert ledger.cancel(entry) == ((0, 1), entry.number) and ledger.cancel(entry) is None
    assert entry.ended and entry.finish_reason == "abort"
    entry = placed(ledger)
    message = [told(entry, i) for i in range(3)]
    assert ledger.take(0, 1, message[0])
    assert ledger.finish(entry) == ((0, 1), entry.number)  # its text was complete with that
    assert ledger.take(0, 1, message[1]) is None and ledger.finish(entry) is None
    assert entry.ended and entry.finish_reason is None and len(entry.tokens) == 1
    assert (ledger.counts.cancelled, ledger.counts.finished) == (2, 1)
    assert ledger.load(Place(0, 1)) == Load()


def test_the_least_loaded_rank_is_chosen():
    ledger = new_ledger()
    for i, length in enumerate((5, 1, 1, 1, 1)):
        ledger.accept(asked(str(i), range(length)))
    live = {2: 7, 0: 4, 1: 9}
    assert [job.place for job in ledger.place(live)] == [(0, 4), (1, 9), (2, 7), (1, 9), (2, 7)]
    assert ledger.load(Place(0, 4)) == Load(1, 5) and ledger.load(Place(1, 9)) == Load(2, 2)
    assert len(ledger.lost(1, 9)) == 2  # the oldest is placed first: it has the lowest key
    moved = ledger.place({0: 4, 2: 7})
    assert [job.place for job in moved] == [(0, 4), (2, 7)] and [job.key for job in moved] == [2, 4]
    assert len(ledger.drain([0, 2])) == 5 == ledger.waiting and not ledger._loads


def test_what_was_lost_is_spread_by_what_has_to_be_prefilled():
    """Also when one rank has just come back and has nothing to do: its clients wait."""
    ledger = new_ledger()
    busy = [ledger.accept(asked(f"busy{i}"))[0] for i in range(6)]
    assert ledger.place({1: 2}) == busy
    lost = [placed(ledger, f"lost{i}", prompt=(1,) * size) for i, size in enumerate((12, 4, 4, 4))]
    ledger.lost(0, 1)
    assert ledger.place({1: 2, 2: 3}) == lost
    assert [entry.place.rank for entry in lost if entry.place] == [2, 1, 1, 1]


def test_what_another_life_had_begun_is_spread_in_the_same_way():
    ledger = new_ledger(first_number=100)
    begun = [Entry(i, asked(f"begun{i}", prompt=(1,) * size), 5) for i, size in enumerate((12, 4, 4, 4))]
    for entry in begun:
        entry.append(TokenEvent(entry.asked.request_id, 0, 9, -0.5, (), None))
    ledger.restore(begun)
    assert ledger.place({1: 2, 2: 3}) == begun
    assert [entry.place.rank for entry in begun if entry.place] == [1, 2, 2, 2]


def test_a_rank_that_comes_takes_over_what_waits_elsewhere():
    ledger = new_ledger(at_once=4, runs=2)
    jobs = [ledger.accept(asked(str(i)))[0] for i in range(6)]
    assert ledger.place({0: 1}) == jobs[:4] and ledger.relieve({0: 1}) == []
    for job in (jobs[0], jobs[3]):
        assert ledger.take(0, 1, told(job, 0)) is not None
    again = [(Place(0, 1), job.number) for job in (jobs[2], jobs[1])]
    assert ledger.relieve({0: 1, 1: 2}) == again and ledger.load(Place(0, 1)).jobs == 2
    assert ledger.place({0: 1, 1: 2}) == [jobs[1], jobs[2], jobs[4], jobs[5]]
    assert [job.place.rank for job in jobs if job.place] == [0, 1, 1, 0, 1, 0]  # two each at work, the others wait
    assert ledger.relieve({0: 1, 1: 2}) == [] and ledger.counts.moved == 2


def test_scores_begin_anew():
    ledger = new_ledger()
    score = ledger.score((1, 2, 3), 2)
    ledger.place({0: 1})
    assert score.command() == {"type": "score", "number": score.number, "token_ids": [1, 2, 3], "chunk": 2}
    rows, number = np.zeros((2, 4), np.float32), score.number
    assert ledger.take_score(0, 1, number, rows) is None
    ledger.lost(0, 1)
    ledger.place({1: 2})
    assert ledger.take_score(0, 1, number, rows) is None and ledger.take_score(1, 2, number, None) is None
    for part in (rows, rows[:1]):
        assert ledger.take_score(1, 2, score.number, part) is None
    assert ledger.take(1, 2, [score.number, 0, 1, 0.0, [], None]) is None
    assert ledger.take_score(1, 2, score.number, None) is score
    assert np.concatenate(score.rows).shape == (3, 4) and len(ledger) == ledger.tokens == 0


def test_restore():
    before = new_ledger()
    entry = placed(before)
    before.take(0, 1, told(entry, 0))
    after = new_ledger(first_number=1000)
    copy = Entry(entry.key, entry.asked, entry.seed, entry.tokens, entry.logprobs, entry.tops)
    after.restore([copy])
    assert after.accept(asked()) == (copy, False) and after.tokens == 4
    assert after.place({0: 1}) == [copy] and copy.number == 1000
    with pytest.raises(ValueError, match="found 'a'"):
        after.restore([copy])


# In histories


def token(seed, prompt, output, salt=0):
    return hash((seed, tuple(prompt), tuple(output), salt)) % 50


def undisturbed(request, seed):
    """The output of a request that nothing happens to."""
    output = []
    while True:
        output.append(token(seed, request.token_ids, output))
        if request.finish_reason(output[-1], len(output), LIMITS.max_model_len) or is_complete(output):
            return output


def is_complete(output):
    """Stands for a stop string: the text is complete, and the engine does not know."""
    return len(output) >= 2 and sum(output[-2:]) % 23 == 0


class FakeEngine:
    """Computes a token a step for some of its requests; knows nothing of being lost.

    With a salt, tokens depend on who computes them, as on a GPU without deterministic mode; log-probabilities tell it.
    """

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self.requests: dict[int, tuple[Request, list[int]]] = {}

    def obey(self, command):
        if command["type"] == "cancel":
            self.requests.pop(command["number"], None)
        else:
            request = unpack_request(command["request"])
            LIMITS.check(request)  # raises for one that has all its tokens
            assert int(request.request_id) not in self.requests
            self.requests[int(request.request_id)] = (request, list(request.output_ids))

    def step(self, which: int):
        events = []
        for number, (request, output) in list(self.requests.items()):
            if (which := which * 5 + 1) % 3 == 0:
                continue
            index = len(output)
            output.append(token(request.params.seed, request.token_ids, output, self.salt))
            reason = request.finish_reason(output[-1], len(output), LIMITS.max_model_len)
            events.append([number, index, output[-1], float(self.salt), [], reason])
            if reason:
                del self.requests[number]
        return events


class World:
    """A coordinator in miniature, its engines, and all that is on its way between them."""

    def __init__(self, salted: bool) -> None:
        self.salted, self.salt = salted, 0
        self.ledger = Ledger(itertools.count().__next__, max_jobs=8, max_tokens=400, at_once=4, runs=2)
        self.incarnations: dict[int, int] = {}  # of the ranks that live, as the coordinator sees it
        self.engines: dict[Place, FakeEngine] = {}  # of the fenced ones, too
        self.commands: dict[Place, deque[Any]] = defaultdict(deque)
        self.messages: dict[Place, deque[Any]] = defaultdict(deque)
        self.said: list[tuple[Place, Any]] = []  # delivered before
        self.streams: dict[str, list[int]] = {}
        self.entries: dict[str, Entry] = {}
        self.cancelled: set[str] = set()
        self.started = 0

    # What may happen; n chooses

    def start(self, n):
        """A rank comes, or comes back. What the coordinator has not heard the end of ends with that."""
        self.lose(n)
        self.started += 1
        place = Place(n % 3, self.started)
        self.engines[place] = self.new_engine()
        self.incarnations[place.rank] = place.incarnation

    def renew(self, n):
        """A new engine in the same life of a rank, with what the old one said still on its way."""
        for place in self.live(n)[:1]:
            self.engines[place] = self.new_engine()
            self.commands[place].clear()
            self.ledger.lost(place.rank, place.incarnation)

    def lose(self, n):
        """Its engine may be dead, or go on for a while, behind a fence or before it."""
        rank = n % 3
        if rank in self.incarnations:
            self.ledger.lost(rank, self.incarnations.pop(rank))

    def die(self, n):
        """Some of what it said is lost with it, and the coordinator will hear of it later."""
        for place in self.live(n)[:1]:
            self.engines.pop(place, None)
            while len(self.messages[place]) > n % 2:
                self.messages[place].pop()

    def drain(self, n):
        """Everything that a leaving rank says has arrived before its requests move."""
        for place in self.live(n)[:1]:
            if len(self.incarnations) > 1:
                while self.messages[place]:
                    self.deliver_from(place)
                del self.incarnations[place.rank]
                self.ledger.drain([place.rank])

    def submit(self, n):
        params = SamplingParams(
            max_tokens=1 + n % 9, seed=None if n % 2 else n, stop_token_ids=[n % 50], ignore_eos=n % 3 == 0
        )
        request = Request(f"request-{n % 64}", [n % 7] * (1 + n % 35), params, eos_token_ids=[3])
        if request.request_id in self.entries:
            return
        try:
            entry, is_new = self.ledger.accept(request)
        except QueueFull:
            return
        assert is_new and self.ledger.accept(request) == (entry, False)
        self.entries[request.request_id], self.streams[request.request_id] = entry, []

    def place(self, n):
        for told in self.ledger.relieve(self.incarnations) if n % 2 else ():
            self.tell_to_cancel(told)
        for job in self.ledger.place(self.incarnations):
            assert job.place is not None
            self.commands[job.place].append(job.command())

    def cancel(self, n):
        if self.entries:
            request_id = sorted(self.entries)[n % len(self.entries)]
            if not self.entries[request_id].ended:
                self.cancelled.add(request_id)
                self.tell_to_cancel(self.ledger.cancel(self.entries[request_id]))

    def obey(self, n):
        for place, commands in self.commands.items():
            while commands and n % 3 != place.rank:
                command = commands.popleft()
                if place in self.engines:
                    self.engines[place].obey(command)

    def step(self, n):
        for place, engine in self.engines.items():
            if (n >> place.rank) % 2 == 0 and (events := engine.step(n)):
                self.messages[place].append(events)

    def deliver(self, n):
        places = [place for place, messages in self.messages.items() if messages]
        if places:
            self.deliver_from(places[n % len(places)])

    def repeat(self, n):
        if self.said:
            self.take(*self.said[n % len(self.said)])

    # How

    def new_engine(self):
        self.salt += self.salted
        return FakeEngine(self.salt)

    def live(self, n):
        places = [Place(*item) for item in sorted(self.incarnations.items())]
        return places[n % len(places) :] if places else []

    def deliver_from(self, place):
        message = self.messages[place].popleft()
        self.said.append((place, message))
        self.take(place, message)

    def take(self, place, message):
        for packed in message:
            if (accepted := self.ledger.take(place.rank, place.incarnation, packed)) is None:
                continue
            entry, event = accepted
            stream = self.streams[event.request_id]
            assert event.index == len(stream) and event.request_id not in self.cancelled
            # It follows from what the client has.
            assert event.token == token(entry.seed, entry.asked.token_ids, stream, int(event.logprob))
            stream.append(event.token)
            if is_complete(stream):
                self.tell_to_cancel(self.ledger.finish(entry))

    def tell_to_cancel(self, told):
        if told is not None:
            self.commands[told[0]].append({"type": "cancel", "number": told[1]})

    def check(self):
        ledger, jobs = self.ledger, list(self.ledger._jobs.values())
        assert ledger.tokens == sum(job.size for job in jobs)
        for place in {job.place for job in jobs if job.place} | set(ledger._loads):
            here = [job for job in jobs if job.place == place]
            assert ledger.load(place) == Load(len(here), sum(job.size for job in here)) != Load()
            assert self.incarnations.get(place.rank) == place.incarnation
        for entry in jobs:
            assert isinstance(entry, Entry)
            # Never all of its tokens without its end: wherever it is, it can go on.
            LIMITS.check(unpack_request(entry.command()["request"]))

    def calm_down(self):
        for rank in range(3):
            self.start(rank)
        for turn in range(200):
            self.place(turn)
            self.obey(turn)
            self.step(turn)
            for place, messages in self.messages.items():
                while messages:
                    self.deliver_from(place)
            if not len(self.ledger):
                return
        raise AssertionError(f"{len(self.ledger)} requests never end")


ACTIONS = ["place", "submit"] * 2 + ["step"] * 4 + ["deliver"] * 4 + ["obey"] * 3
ACTIONS += ["start", "renew", "lose", "die", "drain", "cancel", "repeat"]
HISTORIES = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1 << 12)), min_size=60, max_size=150)


@settings(max_examples=100)
@given(HISTORIES, st.booleans())
def test_every_stream_is_what_it_would_have_been(history, salted):
    world = World(salted)
    for action, n in [("start", 0), ("start", 1), *history]:
        getattr(world, action)(n)
        if n % 8 == 0:
            world.check()
    world.calm_down()
    assert world.ledger.counts.gaps == 0 and not world.ledger._loads
    for request_id, entry in world.entries.items():
        stream = world.streams[request_id]
        assert entry.ended and [e.token for e in entry.events()] == stream
        if not salted:
            expected = undisturbed(entry.asked, entry.seed)
            assert stream == expected[: len(stream)]
            assert len(stream) == len(expected) or request_id in world.cancelled
