"""What a client asks for and what it gets back: sampling parameters, requests, token events, outputs.

Plain values, checked when they are built, shared by the runtime and the servers. This module must not know
how requests are scheduled, how tokens are computed, or how text is made of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 5  # the step returns this many top log-probabilities of every sampled row; its shape is compiled in
MAX_STOPS = 16
# Below these float32 overflows or has no bits left; what is meant is greedy, and the best token alone.
MIN_TEMPERATURE, MIN_TOP_P = 1e-5, 1e-6
MAX_TEMPERATURE = 1e4
INT32_MAX = 2**31 - 1  # tokens, positions and top_k travel in int32 arrays
UINT64_MAX = 2**64 - 1


def _fail(name: str, found: object, expected: str) -> ValueError:
    return ValueError(f"{name}: found {found!r}, expected {expected}")


def _integer(name: str, value: object, low: int, high: int) -> int:
    """value as a Python int in low..high; bool is an Integral in Python, and is refused."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise _fail(name, value, f"an integer in {low}..{high}")
    return int(value)


def _number(name: str, value: object, expected: str) -> float:
    """value as a finite Python float."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise _fail(name, value, expected)
    return float(value)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _fail(name, value, "a sequence of token ids")
    return tuple(_integer(f"{name}[{i}]", token, 0, INT32_MAX) for i, token in enumerate(value))


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Names and defaults follow vLLM.

    Lists are turned into tuples and a single stop string into a tuple of one, so equal parameters compare equal.
    Raises ValueError naming the field, what was found and what was expected.
    """

    max_tokens: int = 16  # tokens to produce at most
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int | None = None  # uint64; None: drawn at admission
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # top log-probabilities reported with each token

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("max_tokens", _integer("max_tokens", self.max_tokens, 1, INT32_MAX))
        put("temperature", _number("temperature", self.temperature, f"a number from 0 to {MAX_TEMPERATURE:g}"))
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise _fail("temperature", self.temperature, f"a number from 0 to {MAX_TEMPERATURE:g}")
        if self.temperature < MIN_TEMPERATURE:
            put("temperature", 0.0)
        put("top_p", _number("top_p", self.top_p, "a number in (0, 1]"))
        if not 0 < self.top_p <= 1:
            raise _fail("top_p", self.top_p, "a number in (0, 1]")
        put("top_p", max(self.top_p, MIN_TOP_P))
        put("top_k", _integer("top_k", self.top_k, 0, INT32_MAX))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, UINT64_MAX))
        if isinstance(self.stop, bytes) or not isinstance(self.stop, Iterable):
            raise _fail("stop", self.stop, "a string or a sequence of strings")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOPS:
            raise _fail("stop", f"{len(stop)} strings", f"at most {MAX_STOPS}")
        for i, text in enumerate(stop):
            if not isinstance(text, str) or not text:
                raise _fail(f"stop[{i}]", text, "a non-empty string")
        put("stop", stop)
        stop_token_ids = _tokens("stop_token_ids", self.stop_token_ids)
        if len(stop_token_ids) > MAX_STOPS:
            raise _fail("stop_token_ids", f"{len(stop_token_ids)} tokens", f"at most {MAX_STOPS}")
        put("stop_token_ids", stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise _fail("ignore_eos", self.ignore_eos, "a bool")
        if self.logprobs is not None:
            put("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))

    def with_seed(self, seed: int) -> SamplingParams:
        """The same parameters with this seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `output_ids` are tokens already produced elsewhere: it goes on at the next one.

    Raises ValueError for an empty request_id or prompt and for anything that is not a token id.
    """

    request_id: str
    token_ids: Sequence[int]  # the prompt
    params: SamplingParams
    output_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not self.request_id:
            raise _fail("request_id", self.request_id, "a non-empty string")
        if not isinstance(self.params, SamplingParams):
            raise _fail("params", self.params, "SamplingParams")
        for name in ("token_ids", "output_ids", "eos_token_ids"):
            object.__setattr__(self, name, _tokens(name, getattr(self, name)))
        if not self.token_ids:
            raise _fail("token_ids", (), "a prompt of at least one token")

    def output_limit(self, max_model_len: int) -> int:
        """Tokens this request may produce in all: max_tokens, clipped so that prompt and output fit the model."""
        return min(self.params.max_tokens, max_model_len - len(self.token_ids))

    def finish_reason(self, token: int, num_output: int, max_model_len: int) -> FinishReason | None:
        """Why the request ends with `token` as the last of its num_output (>= 1) output tokens; None if it goes on.

        The token belongs to the output either way. Stop strings are not its business: they end a request from
        outside, by whoever turns tokens into text.
        """
        if token in self.params.stop_token_ids or (token in self.eos_token_ids and not self.params.ignore_eos):
            return "stop"
        return "length" if num_output >= self.output_limit(max_model_len) else None


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request: `index` is its position in the output, counted from 0 across resumptions."""

    request_id: str
    index: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability), most likely first
    finish_reason: FinishReason | None = None


@dataclass
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, float]] | None = None  # of each token: token id -> log-probability
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """What `LLM.generate` returns for one prompt."""

    request_id: str
    prompt: str | None  # None: the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
