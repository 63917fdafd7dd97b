"""A request's logits are the same bits whatever it is batched with, wherever it runs, and however it is cut up."""

import numpy as np
import pytest

from moe_jax.engine import Engine
from moe_jax.request import Request
from moe_jax.scheduler import Limits, Scheduler
from tests.engines import make_engine, request, run

RNG = np.random.default_rng(0)
PROMPTS = {f"p{i}": RNG.integers(5, 4096, n).tolist() for i, n in enumerate((1, 3, 17, 40, 64, 65, 130, 200))}
TOKENS = 12


@pytest.fixture(scope="module")
def one() -> Engine:
    return make_engine(ranks=1)


@pytest.fixture(scope="module")
def alone(one: Engine) -> dict[tuple[str, int], np.ndarray]:
    """The logits of each request served by itself on one rank: what everything else is compared with."""
    for name, prompt in PROMPTS.items():
        run(one, [request(name, prompt, TOKENS)])
    logits, one.logits = one.logits, {}
    assert len(logits) == len(PROMPTS) * TOKENS
    return logits


def same_bits(found: dict[tuple[str, int], np.ndarray], expected: dict[tuple[str, int], np.ndarray]) -> None:
    compared = 0
    for key, value in found.items():
        if key in expected:
            np.testing.assert_array_equal(value.view(np.int32), expected[key].view(np.int32), err_msg=str(key))
            compared += 1
    assert compared


def make_scheduler(engine: Engine) -> Scheduler:
    """One that knows of no page's contents."""
    return Scheduler(Limits.of(engine.config), engine.config.prefix_caching)


def mixed() -> list[Request]:
    """The requests among others that come and go, some of them long: 32 in all."""
    sizes = [(300, 3), (9, 40), (33, 20), (450, 2), (2, 30), (120, 9), (64, 16), (5, 5)] * 3
    requests = [request(f"x{i}", RNG.integers(5, 4096, n).tolist(), m) for i, (n, m) in enumerate(sizes)]
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        requests.insert(4 * i + 1, request(name, prompt, TOKENS))
    return requests


@pytest.mark.parametrize("ranks, slots", [(1, None), (1, 21), (3, None), (4, None), (4, 9)])
def test_batched_on_any_mesh(alone: dict, ranks: int, slots: int | None) -> None:
    engine = make_engine(ranks=ranks, slots=slots)
    requests = mixed()
    out = run(engine, requests)
    assert len(requests) == 32 and all(len(out[r.request_id]) == r.params.max_tokens for r in requests)
    same_bits({k: v for k, v in engine.logits.items() if k[0] in PROMPTS}, alone)
    assert sum(k[0] in PROMPTS for k in engine.logits) == len(alone)


@pytest.mark.parametrize("ranks, pages", [(1, 64), (3, 64), (1, 9)])
def test_ahead(alone: dict, ranks: int, pages: int) -> None:
    """Tokens that the host has not seen are decoded, among requests that stop on one of them."""
    engine = make_engine(ranks=ranks, num_pages=pages)
    stopping = request("s", PROMPTS["p3"], TOKENS)
    expected = run(make_engine(), [stopping])["s"]
    requests = mixed()
    for i, r in enumerate(requests):
        if r.request_id.startswith("x") and len(r.token_ids) + r.params.max_tokens > 64 * pages - 64:
            requests[i] = request(r.request_id, list(r.token_ids[:9]), 3)
    stops = [request(f"s{i}", PROMPTS["p3"], TOKENS, stop_token_ids=[expected[i]]) for i in range(0, TOKENS, 2)]
    out = run(engine, [*requests, *stops], ahead=True)
    for i, r in zip(range(0, TOKENS, 2), stops, strict=True):
        assert out[r.request_id] == expected[: expected.index(expected[i]) + 1]
    same_bits({k: v for k, v in engine.logits.items() if k[0] in PROMPTS}, alone)
    assert sum(k[0] in PROMPTS for k in engine.logits) == len(alone)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_preempted(ranks: int, alone: dict) -> None:
    engine = make_engine(ranks=ranks, num_pages=9, prefix_caching=False)
    requests = [request(name, prompt, 150) for name, prompt in PROMPTS.items()]
    run(engine, requests, rank=0)
    assert engine.ranks[0].scheduler.stats().preemptions > 0
    same_bits(engine.logits, alone)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_prefix_cache_hits(ranks: int, alone: dict) -> None:
    engine = make_engine(ranks=ranks)
    for _ in range(2):
        run(engine, [request(name, prompt, TOKENS) for name, prompt in PROMPTS.items()], rank=0)
        same_bits(engine.logits, alone)
        engine.logits = {}
    assert engine.ranks[0].scheduler.stats().prefix_hit_tokens > 0


def test_resumed_in_the_middle(one: Engine, alone: dict) -> None:
    """As after a host's loss: prompt and tokens so far are prefilled elsewhere."""
    whole = run(one, [request(name, prompt, TOKENS) for name, prompt in PROMPTS.items()])
    one.logits = {}
    for cut in (1, 5, 11):
        resumed = run(one, [request(name, p, TOKENS, output=whole[name][:cut]) for name, p in PROMPTS.items()])
        assert resumed == whole
    same_bits(one.logits, alone)


def test_scored_at_once_and_step_by_step(one: Engine, alone: dict) -> None:
    """Every row of a prefill gives the bits that decoding gives, whatever the chunk."""
    name, prompt = "p6", PROMPTS["p6"]
    tokens = [int(alone[name, len(prompt) + i].argmax()) for i in range(TOKENS)]
    scores = {}
    for chunk in (None, 1, 7, 16, 31):
        job = one.add_score(0, prompt + tokens, chunk)
        while job.sequence.remaining:
            one.step()
        scores[chunk] = np.concatenate(job.rows)
    for chunk, score in scores.items():
        np.testing.assert_array_equal(score, scores[None], err_msg=str(chunk))
    for i in range(TOKENS):
        x = alone[name, len(prompt) + i].astype(np.float64)
        expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
        np.testing.assert_allclose(scores[None][len(prompt) + i - 1], expected, atol=1e-5)


def test_what_is_not_seen_may_be_anything(one: Engine, alone: dict) -> None:
    """Stale pages may hold NaN; requests that come to use them are not touched by it."""
    one.cache = {name: a * float("nan") for name, a in one.cache.items()}
    one.ranks[0].scheduler = make_scheduler(one)
    one.logits = {}
    run(one, [request(name, prompt, TOKENS) for name, prompt in PROMPTS.items()])
    same_bits(one.logits, alone)


def test_sampled_tokens_do_not_depend_on_company(one: Engine) -> None:
    params = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}
    requests = [request(f"s{i}", PROMPTS["p3"], 10, seed=i, **params) for i in range(12)]
    together = run(one, requests)
    assert len({tuple(t) for t in together.values()}) > 6, "different seeds give different texts"
    for r in requests[:3]:
        assert run(one, [r]) == {r.request_id: together[r.request_id]}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_without_native_kernels(ranks: int) -> None:
    """What a machine without a compiler runs keeps the same promise, with other bits."""
    single = make_engine(ranks=1, kernels="xla")
    for name, prompt in PROMPTS.items():
        run(single, [request(name, prompt, TOKENS)])
    engine = make_engine(ranks=ranks, kernels="xla")
    run(engine, mixed())
    same_bits({k: v for k, v in engine.logits.items() if k[0] in PROMPTS}, single.logits)
