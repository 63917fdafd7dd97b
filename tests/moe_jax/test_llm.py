"""The public face: what a script sees."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moe_jax import LLM, SamplingParams

SMALL: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32, "max_model_len": 512}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **SMALL) as llm:
        yield llm


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **more)  # type: ignore[arg-type]


def test_texts_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "My fellow citizens, "
    ids = llm.tokenizer.encode(text)
    a, b = llm.generate([text, ids], greedy(max_tokens=12))
    assert a.outputs[0].token_ids == b.outputs[0].token_ids and a.prompt == text and b.prompt is None
    assert len(a.outputs[0].token_ids) == 12 and a.outputs[0].finish_reason == "length"
    assert a.outputs[0].text == llm.tokenizer.decode(a.outputs[0].token_ids)
    assert llm.generate(text, greedy(max_tokens=12))[0].outputs[0].text == a.outputs[0].text


def test_stop_string_is_cut_off(llm: LLM) -> None:
    prompt = "The capital of"
    whole = llm.generate(prompt, greedy(max_tokens=20))[0].outputs[0]
    stop = whole.text[10:14]
    cut = llm.generate(prompt, greedy(max_tokens=20, stop=(stop,)))[0].outputs[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 20


def test_stop_token(llm: LLM) -> None:
    whole = llm.generate("The capital of", greedy(max_tokens=20))[0].outputs[0]
    stop = whole.token_ids[5]
    cut = llm.generate("The capital of", greedy(max_tokens=20, stop_token_ids=(stop,)))[0].outputs[0]
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1] and cut.finish_reason == "stop"


def test_logprobs(llm: LLM) -> None:
    out = llm.generate("It was a dark", greedy(max_tokens=5, logprobs=3))[0]
    scores = llm.score([*out.prompt_token_ids, *out.outputs[0].token_ids])
    assert out.outputs[0].logprobs is not None
    for i, (token, top) in enumerate(zip(out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True)):
        row = scores[len(out.prompt_token_ids) + i - 1]
        assert len(top) == 3 and max(top, key=lambda t: top[t]) == token
        np.testing.assert_allclose([top[t] for t in top], row[list(top)], atol=1e-6)


def test_seeds(llm: LLM) -> None:
    one, same, other, drawn = (
        llm.generate("Once upon a time", SamplingParams(max_tokens=16, seed=s))[0].outputs[0].token_ids
        for s in (5, 5, 2**63 + 6, None)
    )
    assert one == same != other and drawn not in (one, other)


def test_streaming_gives_the_same_text(llm: LLM) -> None:
    prompts = ["The capital of", "In Python, a list is", "Call me"]
    expected = [o.outputs[0].text for o in llm.generate(prompts, greedy(max_tokens=15))]
    ids = [llm.submit(p, greedy(max_tokens=15)) for p in prompts]
    texts, done = dict.fromkeys(ids, ""), set()
    while len(done) < 3:
        for update in llm.poll():
            texts[update.request_id] += update.text
            done |= {update.request_id} if update.finish_reason else set()
    assert list(texts.values()) == expected


def test_generate_beside_other_requests(llm: LLM) -> None:
    other = llm.submit("The capital of", greedy(max_tokens=3), request_id="request-7")
    long = llm.submit("The capital of", greedy(max_tokens=30))
    assert len(llm.generate(["Call me"] * 9, greedy(max_tokens=12))) == 9
    seen: dict[str, int] = {}
    while llm._streams or llm._unread:
        for update in llm.poll():
            seen[update.request_id] = seen.get(update.request_id, 0) + len(update.token_ids)
    assert seen == {other: 3, long: 30}


def test_cancel(llm: LLM) -> None:
    gone, kept = (llm.submit("The capital of", greedy(max_tokens=9)) for _ in range(2))
    llm.poll()
    llm.cancel(gone)
    seen = []
    while not seen or seen[-1].finish_reason is None:
        seen += llm.poll()
    assert {u.request_id for u in seen} == {kept}


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "prompt of at least one token"),
        ([4096], {}, "expected 0 to 4095"),
        ([-1], {}, "token"),
        ([5] * 512, {}, "expected at most 511"),
    ],
)
def test_bad_requests_disturb_nothing(llm: LLM, prompt: list[int], params: dict, message: str) -> None:
    other = llm.submit("The capital of", greedy(max_tokens=3))
    with pytest.raises(ValueError, match=message):
        llm.submit(prompt, greedy(**params))
    tokens = []
    while len(tokens) < 3:
        tokens += [t for u in llm.poll() for t in u.token_ids if u.request_id == other]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hosts": 0}, "hosts: found 0"),
        ({"load_format": "quick"}, "load_format"),
        ({"max_batch": 17}, "multiple of 16"),
        ({"slots": 3}, "need at least 16"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"pages": 3}, "options: found pages"),
        ({"kernels": "fast"}, "kernels"),
        ({"ranks_per_host": 64}, "ranks_per_host"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**options)


def test_closed(llm: LLM) -> None:
    second = LLM("demo", **SMALL)
    second.close()
    second.close()
    with pytest.raises(RuntimeError, match="closed"):
        second.submit("x")


def test_every_expert_matters(llm: LLM) -> None:
    """Taking away any one expert changes logits, so that a lost one cannot go unnoticed."""
    from moe_jax.mesh import REPLICATED
    from tests.engines import make_engine

    engine = make_engine(return_logits=False)
    ids = llm.tokenizer.encode("My fellow citizens, in Python a list is a dark and stormy night of the sea. " * 12)

    def score() -> np.ndarray:
        job = engine.add_score(0, ids)
        while job.sequence.remaining:
            engine.step()
        return np.concatenate(job.rows)

    whole, table = score(), np.asarray(engine.fixed[-1])
    for layer, expert in [(0, 0), (1, 5), (2, 9), (3, 15), (4, 2)]:
        lost = table.copy()
        lost[layer, expert] = -1
        engine.fixed[-1] = engine.own.put([lost], REPLICATED)
        assert np.abs(score() - whole).max() > 1e-2, (layer, expert)
