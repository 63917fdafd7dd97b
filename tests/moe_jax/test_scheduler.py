import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.request import Request, SamplingParams
from moe_jax.scheduler import Limits, QueueFull, Scheduler

EOS = 3
TILE = 16


def fingerprints(tokens, known=None):
    """Extend `known` to one value per position that stands for all tokens up to it, which is what K/V depend on."""
    known = [] if known is None else known
    for position in range(len(known), len(tokens)):
        known.append(hash((known[-1] if known else 0, position, tokens[position])))
    return known


def next_token(known):
    """The fake model: a fixed function of every token so far."""
    return known[-1] // 7 % 4


def undisturbed(request, max_model_len):
    """The output, and why it ends, of a request served alone."""
    output, tokens, known = list(request.output_ids), [*request.token_ids, *request.output_ids], []
    while True:
        output.append(next_token(fingerprints(tokens, known)))
        tokens.append(output[-1])
        reason = request.finish_reason(output[-1], len(output), max_model_len)
        if reason:
            return output, reason


class Rank:
    """A scheduler, a fake device cache, and the checks that every step must pass."""

    def __init__(self, limits, prefix_caching=True):
        self.limits = limits
        self.scheduler = Scheduler(limits, prefix_caching)
        self.cache = {}  # (page, offset) -> the fingerprint of what was written there last
        self.flights = {}  # what plans in flight were given: of each entry its tokens, as far as known, and its pages
        self.given = []  # the tokens that the step before gave
        self.arrivals = {}  # order in which sequences were added
        self.outputs = {}
        self.reasons = {}

    def add(self, request, accepted=False):
        self.scheduler.add(request, accepted)
        self.arrivals[self.scheduler._waiting[-1]] = len(self.arrivals)
        self.outputs[request.request_id] = list(request.output_ids)

    def schedule(self, rows, prefill):
        starts = {s: s.num_computed + s.scheduled for s in self.scheduler._running}
        plan = self.scheduler.schedule(rows, prefill)
        self.check(plan, rows, prefill, starts)
        self.flights[plan] = [(e.sequence.token_ids[: e.start + e.count], list(e.sequence.pages)) for e in plan.entries]
        return plan

    def check(self, plan, rows, prefill, starts):
        limits, pool = self.limits, self.scheduler.pool
        assert plan.rows <= rows and plan.rows % TILE == 0
        assert len(plan.entries) <= limits.max_batch
        decodes = [entry for entry in plan.entries if entry.is_decode]
        assert decodes == plan.entries[: plan.decode_rows] and len(decodes) == plan.decode_rows
        assert [entry.first_row for entry in decodes] == list(range(len(decodes)))
        assert all(entry.count == 1 and entry.sample for entry in decodes)
        row = first = -(-len(decodes) // TILE) * TILE
        for entry in plan.entries[len(decodes) :]:
            assert prefill and entry.first_row == row and entry.count > 0
            row += -(-entry.count // TILE) * TILE
        assert row == plan.rows and row - first <= limits.max_prefill_rows
        assert len({id(entry.sequence) for entry in plan.entries}) == len(plan.entries)
        for entry in plan.entries:
            sequence, size = entry.sequence, limits.page_size
            end = entry.start + entry.count
            assert entry.start == starts.get(sequence, sequence.num_computed) and len(sequence.pages) * size >= end
            unknown = entry.after is not None
            assert not unknown or (entry.is_decode and len(self.flights) == 1)
            assert entry.sample == (end == len(sequence.token_ids) + unknown) and entry.sample_position == end
            for position in range(entry.start, end):
                assert pool.references(sequence.pages[position // size]) == 1
            assert sequence in self.scheduler._running
        order = [self.arrivals[s] for s in (*self.scheduler._running, *self.scheduler._waiting)]
        assert order == sorted(order)  # nobody was overtaken or preempted by a younger one
        held = Counter(page for sequence in self.scheduler._running for page in sequence.pages)
        assert [pool.references(page) for page in range(limits.num_pages)] == [held[p] for p in range(limits.num_pages)]
        assert not any(sequence.pages for sequence in self.scheduler._waiting)

    def complete(self, plan):
        tokens, size = [], self.limits.page_size
        for entry, (inputs, pages) in zip(plan.entries, self.flights.pop(plan), strict=True):
            known = fingerprints(inputs if entry.after is None else [*inputs, self.given[entry.after]])
            assert len(known) == entry.start + entry.count
            for position in range(entry.start):
                assert self.cache[pages[position // size], position % size] == known[position]
            for position in range(entry.start, len(known)):  # the engine writes K/V first
                self.cache[pages[position // size], position % size] = known[position]
            tokens += [next_token(known)] if entry.sample else []
        self.given = tokens
        for event in self.scheduler.complete(plan, [(token, -float(token), [(token, 0.0)]) for token in tokens]):
            output = self.outputs[event.request_id]
            assert event.index == len(output) and event.logprob == -event.token and event.top == ((event.token, 0.0),)
            assert event.request_id not in self.reasons
            output.append(event.token)
            if event.finish_reason:
                self.reasons[event.request_id] = event.finish_reason

    def discard(self, plan):
        self.scheduler.discard(plan)
        for other in list(self.flights)[list(self.flights).index(plan) :]:
            del self.flights[other]

    def finish(self, wish):
        """Run steps, each as the one before it wished, until no work is left."""
        placed = True
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            plan = self.schedule(*wish)
            # A wish rides on a step whose result may change everything, but the next one makes good for it.
            assert plan.entries or placed
            placed = bool(plan.entries)
            wish = self.scheduler.wish()
            self.complete(plan)
            assert wish != (0, False) or not self.scheduler.has_work
        assert not self.scheduler.has_work and self.scheduler.stats().pages_used == 0
        assert self.scheduler.stats().waiting == 0 and self.scheduler._waiting_tokens == 0
        assert self.scheduler.wish() == (0, False)


def limits_of(rng):
    size = rng.choice((1, 2, 4, 8, 16))
    return Limits(
        page_size=size,
        num_pages=rng.randint(-(-24 // size), -(-120 // size)),
        max_batch=rng.choice((16, 32)),
        max_prefill_rows=rng.choice((16, 32, 64)),
        max_model_len=rng.randint(2, 90),
        max_waiting_tokens=rng.choice((100, 1000)),
    )


def request_of(rng, number, max_model_len):
    prompt = [0] * rng.randrange(12) + [rng.randrange(2) for _ in range(rng.randint(1, rng.choice((4, 40))))]
    params = SamplingParams(
        max_tokens=rng.randint(1, 30),
        ignore_eos=rng.random() < 0.6,
        stop_token_ids=[2] if rng.random() < 0.1 else (),
    )
    request = Request(str(number), prompt, params, eos_token_ids=[EOS])
    if len(prompt) < max_model_len and rng.random() < 0.3:  # resumed somewhere before its end
        output, _ = undisturbed(request, max_model_len)
        request = Request(str(number), prompt, params, output[: rng.randrange(len(output))], [EOS])
    return request


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories(seed):
    """Whatever the interleaving, capacities, failures and cancellations: each output is the undisturbed one."""
    rng = random.Random(seed)
    limits = limits_of(rng)
    rank = Rank(limits, prefix_caching=rng.random() < 0.8)
    requests, cancelled, number, wish = {}, set(), 0, (0, False)

    ahead = rng.random() < 0.5

    def disturb():
        nonlocal number
        while rng.random() < 0.4:
            request = request_of(rng, number, limits.max_model_len)
            number += 1
            try:
                rank.add(request, accepted=rng.random() < 0.2)
                requests[request.request_id] = request
            except QueueFull:
                assert rank.scheduler._waiting_tokens + 60 > limits.max_waiting_tokens - 60
            except ValueError as error:
                assert "prompt" in str(error) and "expected" in str(error)
        if number and rng.random() < 0.08:
            name = str(rng.randrange(number))
            alive = name in requests and name not in rank.reasons and name not in cancelled
            assert rank.scheduler.cancel(name) == alive
            if alive:
                cancelled.add(name)

    for _ in range(rng.randrange(40)):
        disturb()
        fresh = rank.scheduler.wish()
        match rng.randrange(4):
            case 0:
                rows, prefill = rng.randrange(0, 100), rng.random() < 0.7
            case 1:
                rows, prefill = wish
            case _:
                rows, prefill = fresh
        idle = not rank.scheduler.has_work
        assert (fresh == (0, False)) if idle else (fresh != (0, False) or rank.flights)
        if not rank.flights or rank.scheduler.can_look_ahead:
            plan = rank.schedule(rows, prefill)
            assert plan.entries or idle or rank.flights or (rows, prefill) != fresh
            disturb()
        wish = rank.scheduler.wish()
        disturb()
        if ahead and len(rank.flights) == 1 and rng.random() < 0.6:
            continue
        oldest, *others = rank.flights
        if rng.random() < 0.15:
            rank.discard(rng.choice([oldest, *others]))
        else:
            rank.complete(oldest)
    while rank.flights:
        rank.complete(next(iter(rank.flights)))
    rank.finish(rank.scheduler.wish())
    for name, request in requests.items():
        output, reason = undisturbed(request, limits.max_model_len)
        if name in cancelled:
            assert rank.outputs[name] == output[: len(rank.outputs[name])] and name not in rank.reasons
        else:
            assert (rank.outputs[name], rank.reasons[name]) == (output, reason)


LIMITS = Limits(page_size=4, num_pages=64, max_batch=16, max_prefill_rows=32, max_model_len=100)


def ask(name, prompt, max_tokens=8, **params):
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params), eos_token_ids=[EOS])


def step(rank, wish=None):
    plan = rank.schedule(*(wish or rank.scheduler.wish()))
    rank.complete(plan)
    return plan


def shape(plan):
    return [(e.sequence.request.request_id, e.start, e.count, e.first_row, e.sample, e.is_decode) for e in plan.entries]


def test_decode_first_then_chunks_in_order_of_arrival():
    rank = Rank(LIMITS)
    assert rank.scheduler.wish() == (0, False)
    rank.add(ask("a", [1] * 5))
    rank.add(ask("b", [2] * 40))
    rank.add(ask("c", [3] * 3))
    assert rank.scheduler.wish() == (32, True)
    plan = rank.schedule(32, True)
    assert shape(plan) == [("a", 0, 5, 0, True, False), ("b", 0, 16, 16, False, False)]
    assert rank.scheduler.wish() == (48, True)
    rank.complete(plan)
    plan = step(rank, (48, True))
    assert shape(plan) == [("a", 5, 1, 0, True, True), ("b", 16, 24, 16, True, False)]
    assert (plan.decode_rows, plan.rows) == (1, 48)
    assert rank.scheduler.wish() == (32, True)
    assert shape(step(rank))[1:] == [("b", 40, 1, 1, True, True), ("c", 0, 3, 16, True, False)]
    assert rank.scheduler.wish() == (16, False)


def test_capacity_is_obeyed():
    rank = Rank(LIMITS)
    for i in range(16):
        rank.add(ask(str(i), [i + 1]))
    for _ in range(8):
        step(rank)
    plan = rank.schedule(15, True)
    assert plan.entries == []  # less than a tile
    rank.discard(plan)
    rank.add(ask("x", [1]))
    plan = rank.schedule(100, False)
    assert plan.rows == 16 and all(entry.is_decode for entry in plan.entries)


def test_discard_schedules_the_same_work_again():
    rank = Rank(LIMITS)
    rank.add(ask("a", [1] * 20))
    for rows in (16, 16, 16):
        first = rank.schedule(rows, True)
        rank.discard(first)
        second = rank.schedule(rows, True)
        assert shape(first) == shape(second)
        rank.complete(second)
    rank.finish(rank.scheduler.wish())


def test_wish_knows_who_ends_and_who_waits_for_its_pages():
    limits = Limits(page_size=4, num_pages=4, max_batch=16, max_prefill_rows=32, max_model_len=16)
    rank = Rank(limits)
    rank.add(ask("a", [1] * 14, max_tokens=1))
    plan = rank.schedule(16, True)
    assert rank.scheduler.wish() == (0, False)
    rank.add(ask("b", [2] * 14, max_tokens=2))
    assert rank.scheduler.wish() == (16, True)  # all pages are a's, but a ends here
    rank.complete(plan)
    rank.finish((16, True))


def test_prefix_is_found_again_but_never_the_last_token():
    rank = Rank(LIMITS)
    prompt = list(range(12))
    rank.add(ask("a", prompt, max_tokens=1))
    step(rank)
    rank.add(ask("b", prompt, max_tokens=1))
    assert shape(step(rank)) == [("b", 8, 4, 0, True, False)]
    assert rank.scheduler.stats().prefix_hit_tokens == 8
    rank.add(ask("c", [*prompt, 5], max_tokens=1))
    assert shape(step(rank)) == [("c", 12, 1, 0, True, False)]


def test_one_prefix_computed_twice_at_once():
    rank = Rank(LIMITS)
    for name in "ab":
        rank.add(ask(name, [7] * 12))
    plan = step(rank)
    first, second = (entry.sequence.pages for entry in plan.entries)
    assert not set(first) & set(second)
    rank.finish(rank.scheduler.wish())
    assert rank.outputs["a"] == rank.outputs["b"]


def test_preemption_takes_the_youngest_and_keeps_its_tokens():
    limits = Limits(page_size=4, num_pages=8, max_batch=16, max_prefill_rows=64, max_model_len=32)
    rank = Rank(limits, prefix_caching=False)
    for i, name in enumerate("abc"):
        rank.add(ask(name, [i] * 4, max_tokens=20))
    order = []
    while rank.scheduler.has_work:
        step(rank)
        order += [name for name in rank.reasons if name not in order]
    assert order == ["a", "b", "c"] and rank.scheduler.stats().preemptions > 0
    assert all(len(output) == 20 for output in rank.outputs.values())


def test_resumed_request_goes_on_at_its_next_token():
    rank = Rank(LIMITS)
    whole = ask("a", [1, 2, 3], max_tokens=10)
    output, _ = undisturbed(whole, LIMITS.max_model_len)
    rank.add(Request("a", whole.token_ids, whole.params, output[:6], whole.eos_token_ids))
    plan = rank.schedule(16, True)
    assert shape(plan) == [("a", 0, 9, 0, True, False)]
    assert (plan.entries[0].sample_position, plan.entries[0].sample_row) == (9, 8)
    rank.complete(plan)
    rank.finish(rank.scheduler.wish())
    assert rank.outputs["a"] == output


def test_cancel():
    rank = Rank(LIMITS)
    for name in "ab":
        rank.add(ask(name, [1] * 20))
    assert not rank.scheduler.cancel("x")
    step(rank, (16, True))
    plan = rank.schedule(16, False)
    assert not plan.entries  # both are still prompts: a not in the plan, so its pages are free at once
    assert rank.scheduler.cancel("a") and rank.scheduler.stats().pages_used == 0
    rank.complete(plan)
    plan = rank.schedule(32, True)
    assert rank.scheduler.cancel("b") and not rank.scheduler.cancel("b")
    assert rank.scheduler.stats().pages_used > 0 and rank.scheduler.wish() == (0, False)
    rank.add(ask("b", [9] * 3))  # the name is free again
    rank.complete(plan)
    assert rank.outputs["b"] == [] and rank.scheduler.stats().pages_used == 0
    rank.finish(rank.scheduler.wish())
    assert len(rank.outputs["b"]) == 8


def test_add_refuses_what_cannot_be_served():
    scheduler = Scheduler(Limits(page_size=4, num_pages=5, max_batch=16, max_prefill_rows=16, max_model_len=30))
    with pytest.raises(ValueError, match=r"prompt: found 30 tokens, expected at most 29"):
        scheduler.add(ask("a", [1] * 30))
    with pytest.raises(ValueError, match=r"found 20 \+ 2 tokens, which take 6 pages, expected at most the pool's 5"):
        scheduler.add(ask("a", [1] * 20, max_tokens=2))
    scheduler.add(ask("a", [1] * 20, max_tokens=1))
    with pytest.raises(ValueError, match="request_id"):
        scheduler.add(ask("a", [1]))
    with pytest.raises(ValueError, match=r"output_ids: found 2 tokens that end the request \('length'\)"):
        scheduler.add(Request("b", [1], SamplingParams(max_tokens=2), [5, 6]))


def test_max_tokens_is_clipped_to_the_model():
    rank = Rank(Limits(page_size=4, num_pages=8, max_batch=16, max_prefill_rows=16, max_model_len=10))
    rank.add(ask("a", [1] * 7, max_tokens=50))
    rank.finish(rank.scheduler.wish())
    assert len(rank.outputs["a"]) == 3 and rank.reasons["a"] == "length"


def test_queue_is_bounded_except_for_accepted_requests():
    limits = Limits(
        page_size=4, num_pages=64, max_batch=16, max_prefill_rows=16, max_model_len=20, max_waiting_tokens=20
    )
    scheduler = Scheduler(limits)
    scheduler.add(ask("a", [1] * 15))
    with pytest.raises(QueueFull, match="found 15 tokens waiting and 6 more, expected at most 20"):
        scheduler.add(ask("b", [1] * 6))
    scheduler.add(ask("b", [1] * 6), accepted=True)
    assert scheduler.stats().waiting == 2


def test_looking_ahead_decodes_tokens_that_are_not_known_yet():
    rank = Rank(replace(LIMITS, max_prefill_rows=48))
    for name, most in zip("abc", (2, 8, 8), strict=True):
        rank.add(ask(name, [7] * 3, max_tokens=most, stop_token_ids=[0, 1, 2, 3] if name == "b" else ()))
    assert not rank.scheduler.can_look_ahead
    first = rank.schedule(48, True)
    assert rank.scheduler.can_look_ahead and rank.scheduler.wish() == (16, False)
    second = rank.schedule(16, False)
    assert [entry.after for entry in second.entries] == [0, 1, 2] and not rank.scheduler.can_look_ahead
    rank.complete(first)
    assert rank.reasons == {"b": "stop"} and rank.scheduler.stats().pages_used == 3  # b's is still written to
    third = rank.schedule(16, False)
    assert [(e.sequence.request.request_id, e.after) for e in third.entries] == [("c", 2)]  # a ends with the second
    rank.complete(second)
    assert rank.reasons == {"a": "length", "b": "stop"} and rank.scheduler.stats().pages_used == 2
    rank.discard(third)
    rank.finish(rank.scheduler.wish())
    assert [len(rank.outputs[name]) for name in "abc"] == [2, 1, 8]


def test_the_last_token_of_a_request_takes_a_place_in_its_step():
    rank = Rank(replace(LIMITS, max_prefill_rows=512))
    for i in range(17):
        rank.add(ask(str(i), [i] * 3, max_tokens=2))
    rank.complete(rank.schedule(512, True))
    rank.complete(last := rank.schedule(512, True))
    assert last.decode_rows == 16 == len(last.entries)
    rank.finish(rank.scheduler.wish())


def test_who_ends_with_this_plan_is_in_it_all_the_same():
    """Somebody may start for each that is certain to have ended before the plan, and nobody for those it ends."""
    rank = Rank(replace(LIMITS, max_prefill_rows=256))
    for i in range(16):
        rank.add(ask(f"r{i}", [i] * 3, max_tokens=min(2 + i, 8)))
    step(rank)
    rank.schedule(16, False)  # r0 ends with it
    for name in "ab":
        rank.add(ask(name, [1] * 3))
    plan = rank.schedule(64, True)  # r1 ends with it
    assert [e.sequence.request.request_id for e in plan.entries if not e.is_decode] == ["a"]
    assert len(plan.sampled) == 16


def test_nobody_looks_ahead_when_a_page_must_be_taken_for_it():
    rank = Rank(Limits(page_size=4, num_pages=3, max_batch=16, max_prefill_rows=32, max_model_len=8))
    for name in "ab":
        rank.add(ask(name, [1] * 4, max_tokens=4))
    rank.schedule(32, True)
    assert not rank.scheduler.can_look_ahead
    with pytest.raises(RuntimeError, match="in flight"):
        rank.scheduler.schedule(16, True)


def test_two_plans_at_most():
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask("a", [1]))
    plan = scheduler.schedule(16, True)
    second = scheduler.schedule(16, True)
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.schedule(16, True)
    with pytest.raises(RuntimeError, match="the oldest"):
        scheduler.complete(second, [])
    scheduler.discard(second)
    with pytest.raises(ValueError, match="found 0, expected 1"):
        scheduler.complete(plan, [])
    scheduler.complete(plan, [(5, 0.0, ())])
    for late in (lambda: scheduler.complete(plan, []), lambda: scheduler.discard(plan)):
        with pytest.raises(RuntimeError, match="not in flight"):
            late()
    with pytest.raises(ValueError, match="rows"):
        scheduler.schedule(-1, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("page_size", 0), ("max_batch", 17), ("max_prefill_rows", 8), ("max_model_len", 1), ("max_waiting_tokens", 5)],
)
def test_bad_limits_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Limits(**vars(LIMITS) | {name: value})
