import math
from typing import Any

import numpy as np
import pytest

from moe_jax.request import MAX_LOGPROBS, MAX_STOPS, Request, SamplingParams


def test_defaults():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert params.seed is None and params.stop == () and params.logprobs is None and not params.ignore_eos


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("max_tokens", "top_k", "seed", "logprobs") for value in (-1, True, "1", 1.5, math.nan)]
    + [(name, value) for name in ("temperature", "top_p") for value in (-0.1, True, "1", None, math.nan, math.inf)]
    + [
        ("max_tokens", 0),
        ("max_tokens", None),
        ("max_tokens", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("seed", 2**64),
        ("logprobs", MAX_LOGPROBS + 1),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 3),
        ("stop", b"x"),
        ("stop", ["x"] * (MAX_STOPS + 1)),
        ("stop_token_ids", "12"),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [0] * (MAX_STOPS + 1)),
        ("ignore_eos", 1),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}.*found.*expected"):
        SamplingParams(**{name: value})


def test_values_are_normalised():
    four: Any = np.int32(4)
    params = SamplingParams(max_tokens=four, temperature=0, stop="end", stop_token_ids=[1, 2], seed=2**64 - 1)
    assert type(params.max_tokens) is int and type(params.temperature) is float
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
    assert params == SamplingParams(max_tokens=4, temperature=0.0, stop=["end"], stop_token_ids=(1, 2), seed=2**64 - 1)
    assert params.with_seed(5).seed == 5 and params.with_seed(5).stop == ("end",)
    with pytest.raises(ValueError, match="seed"):
        params.with_seed(-1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"request_id": ""},
        {"token_ids": []},
        {"token_ids": [-1]},
        {"token_ids": ["a"]},
        {"token_ids": [2**31]},
        {"output_ids": [1.0]},
        {"eos_token_ids": 3},
        {"params": None},
    ],
)
def test_bad_requests_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"^{name}.*found.*expected"):
        Request(**{"request_id": "a", "token_ids": [1], "params": SamplingParams()} | arguments)


def test_finish_reason():
    def reason(token, num_output, max_model_len=100, **params):
        request = Request("a", [1, 2], SamplingParams(max_tokens=3, **params), eos_token_ids=(7,))
        return request.finish_reason(token, num_output, max_model_len)

    assert reason(5, 2) is None
    assert reason(5, 3) == "length"
    assert reason(5, 2, max_model_len=4) == "length"
    assert reason(7, 1) == "stop" and reason(7, 3) == "stop"
    assert reason(7, 1, ignore_eos=True) is None
    assert reason(7, 1, ignore_eos=True, stop_token_ids=[7]) == "stop"
    assert reason(5, 1, stop_token_ids=[5]) == "stop"


def test_values_that_float32_cannot_hold() -> None:
    assert SamplingParams(temperature=1e-30).temperature == 0
    assert SamplingParams(top_p=1e-300).top_p > 0
    with pytest.raises(ValueError, match="temperature"):
        SamplingParams(temperature=1e39)
