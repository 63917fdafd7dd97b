"""`LLM`: a model in a script, after vLLM's class of the same name.

    llm = LLM(model="demo", hosts=4)
    outs = llm.generate(["The capital of"], SamplingParams(max_tokens=64, temperature=0.0))

With hosts=1 the engine runs in this process; otherwise `serving.launcher` starts one process a rank. Either is a
`Backend`: requests in, token events out. Text is made here, as a pure function of the tokens.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_jax.config import ConfigError, EngineConfig, ModelConfig
from moe_jax.memory import pages_that_fit, position_bytes
from moe_jax.request import CompletionOutput, Request, RequestOutput, SamplingParams, TokenEvent
from moe_jax.scheduler import QueueFull
from moe_jax.text import Detokenizer, Tokenizer

Prompt = str | Sequence[int]
# Of `serving.cluster_backend`; one host has no use for them.
CLUSTER_OPTIONS = ("cache_dir", "startup_timeout", "stall_timeout", "heartbeat_timeout", "window", "restart")


class Backend(Protocol):
    """Where requests are served."""

    model: ModelConfig
    config: EngineConfig

    def submit(self, request: Request) -> None:
        """Raises ValueError for what can never be served, scheduler.QueueFull for what cannot be now."""
        ...

    def cancel(self, request_id: str) -> None: ...

    def poll(self, timeout: float | None) -> list[TokenEvent]:
        """New tokens; blocks until there are some, at most `timeout` seconds."""
        ...

    def score(self, token_ids: Sequence[int], chunk: int | None) -> np.ndarray: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Update:
    """What happened to a request since the last poll."""

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[dict[int, float]] | None
    finish_reason: str | None


@dataclass
class _Stream:
    """A request that is being served, and what has come of it."""

    request: Request
    detokenizer: Detokenizer
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    cumulative: float = 0.0

    def take(self, event: TokenEvent) -> tuple[str, str | None]:
        """Add one token: the text it gives, and the finish reason if it is the last."""
        assert event.index == len(self.tokens), (event, len(self.tokens))
        reason = event.finish_reason
        self.tokens.append(event.token)
        self.cumulative += event.logprob
        if self.request.params.logprobs is not None:
            self.logprobs.append({event.token: event.logprob} | dict(event.top))
        # A token that ends the request by its id is reported, but is no text.
        silent = reason == "stop"
        text = "" if silent else self.detokenizer.push([event.token])
        if self.detokenizer.stop is not None:
            reason = "stop"
        elif reason is not None:
            text += self.detokenizer.flush()
            reason = "stop" if self.detokenizer.stop is not None else reason
        self.text.append(text)
        return text, reason


def model_directory(model: str | os.PathLike[str]) -> Path:
    """A model's directory; "demo" is the one that ships with the package."""
    return Path(__file__).parent / "demo" if model == "demo" else Path(model)


def engine_config(
    model: ModelConfig, ranks: int, platform: str, memory: int | None = None, **options: Any
) -> EngineConfig:
    """Options of `LLM` as an EngineConfig, with defaults that fit the model and the platform ("cpu" or "gpu").

    memory: bytes that JAX has on each device, where that is known; pages that were not asked for then take what weights
    and workspace leave.
    """
    known = {k: v for k, v in options.items() if v is not None}
    on_cpu = platform == "cpu"
    known.setdefault("max_model_len", min(model.max_position, 4096))
    if known["max_model_len"] > model.max_position:
        raise ValueError(
            f"max_model_len: found {known['max_model_len']}, expected at most the model's {model.max_position}"
        )
    known.setdefault("dtype", "float32" if on_cpu else "bfloat16")
    known.setdefault("deterministic", on_cpu)
    if memory is not None:
        known.setdefault("max_batch", 256)
    if not on_cpu:  # a lost rank's requests are prefilled while clients wait
        known.setdefault("max_prefill_rows", 2048 if memory is None else 8192)
    config = EngineConfig(ranks=ranks, **known)
    if memory is not None:
        fit = pages_that_fit(model, config, memory)
        known.setdefault("num_pages", min(fit, config.max_batch * config.pages_per_sequence))
        config = replace(config, num_pages=known["num_pages"])
        if config.num_pages > fit:
            raise ConfigError(
                f"num_pages: found {config.num_pages}, expected at most {fit}: the device has room for so many pages "
                f"of {config.page_size * position_bytes(model, config)} bytes beside weights and workspace"
            )
    if "num_pages" not in known:
        each = -(-min(config.max_model_len, 1024) // config.page_size)
        config = replace(config, num_pages=max(config.pages_per_sequence, config.max_batch * each))
    config.slots_for(model.num_experts)  # raises if they are too few
    return config


class LLM:
    """A model that generates. Close it, or use it in a `with` statement; several may live in one process.

    model: "demo", or a directory in Hugging Face form or made by `moe-jax convert`. hosts: failure domains, each a
    process of its own if there are several; ranks_per_host: accelerators of each. With one host on CPU, ranks are
    virtual devices of this process, which needs JAX not to have been used before.
    Further options are fields of `EngineConfig`, and load_format ("auto", or "dummy" for random weights).
    Raises ValueError (its subclasses CheckpointError and ConfigError) for a model or options that cannot be served.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        hosts: int = 1,
        ranks_per_host: int = 1,
        load_format: str = "auto",
        **options: Any,
    ) -> None:
        for name, value in (("hosts", hosts), ("ranks_per_host", ranks_per_host)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: found {value!r}, expected a positive integer")
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format: found {load_format!r}, expected 'auto' or 'dummy'")
        path = model_directory(model)
        known = {f.name for f in fields(EngineConfig)} - {"ranks"} | set(CLUSTER_OPTIONS)
        if unknown := sorted(set(options) - known):
            raise ValueError(f"options: found {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
        self._streams: dict[str, _Stream] = {}
        self._unread: list[Update] = []  # of other requests, come while `generate` waited for its own
        self._next_id = 0
        self._backend: Backend
        self.tokenizer = Tokenizer.from_directory(path)
        if hosts == 1:
            from moe_jax.local import LocalBackend

            own = {name: value for name, value in options.items() if name not in CLUSTER_OPTIONS}
            self._backend = LocalBackend(path, ranks_per_host, load_format, own)
        else:
            from serving.cluster_backend import ClusterBackend

            self._backend = ClusterBackend(path, hosts, ranks_per_host, load_format, options)
        self._eos = self.tokenizer.eos_token_ids or self.config.eos_token_ids

    @property
    def config(self) -> ModelConfig:
        return self._backend.model

    @property
    def engine_config(self) -> EngineConfig:
        return self._backend.config

    # One request at a time

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt, text or token ids; `poll` brings what comes of it. Returns its id.

        Raises ValueError for a request that cannot be served, scheduler.QueueFull when the queue is.
        """
        params, automatic = params or SamplingParams(), request_id is None
        if params.seed is None:
            params = params.with_seed(secrets.randbits(64))
        while request_id is None or (automatic and request_id in self._streams):
            request_id, self._next_id = f"request-{self._next_id}", self._next_id + 1
        if request_id in self._streams:
            raise ValueError(f"request_id: found {request_id!r}, which is being served, expected a new one")
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        request = Request(request_id, token_ids, params, eos_token_ids=self._eos)
        self._check_tokens(request.token_ids)
        self._backend.submit(request)
        self._streams[request_id] = _Stream(request, Detokenizer(self.tokenizer, params.stop))
        return request_id

    def poll(self, timeout: float | None = None) -> list[Update]:
        """What is new, one Update a request; blocks until there is something, at most `timeout` seconds."""
        unread, self._unread = self._unread, []
        if unread:
            return unread
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._streams:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = [e for e in self._backend.poll(left) if e.request_id in self._streams]
            if events or (left is not None and left <= 0):
                return self._updates(events)
        return []

    def cancel(self, request_id: str) -> None:
        """Forget a request; nothing more is heard of it."""
        if self._streams.pop(request_id, None):
            self._backend.cancel(request_id)
        self._unread = [u for u in self._unread if u.request_id != request_id]

    def _updates(self, events: list[TokenEvent]) -> list[Update]:
        grouped: dict[str, list[TokenEvent]] = {}
        for event in events:
            grouped.setdefault(event.request_id, []).append(event)
        return [self._update(request_id, own) for request_id, own in grouped.items()]

    def _update(self, request_id: str, events: list[TokenEvent]) -> Update:
        stream = self._streams[request_id]
        before, text, reason = len(stream.tokens), "", None
        for event in events:
            delta, reason = stream.take(event)
            text += delta
            if reason is not None:
                del self._streams[request_id]
                if event.finish_reason is None:  # a stop string: the engine does not know of it
                    self._backend.cancel(request_id)
                break
        logprobs = stream.logprobs[before:] if stream.request.params.logprobs is not None else None
        return Update(request_id, stream.tokens[before:], text, logprobs, reason)

    # Many at once

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue each prompt; results in the order of the prompts. Raises ValueError as `submit`, serving none then.

        prompts: one text, or a list of texts and token id lists. params: for all, or one for each.
        """
        batch: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)  # type: ignore[arg-type]
        if batch and isinstance(batch[0], (int, np.integer)):
            batch = [batch]  # type: ignore[list-item]
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"params: found {len(each)}, expected one, or one for each of {len(batch)} prompts")
        ids: list[str] = []
        streams: list[_Stream] = []
        reasons: dict[str, str | None] = {}
        others = self._unread

        def advance() -> None:
            self._unread = []
            for update in self.poll():
                if update.request_id not in ids:
                    others.append(update)
                elif update.finish_reason is not None:
                    reasons[update.request_id] = update.finish_reason

        try:
            for prompt, p in zip(batch, each, strict=True):
                while True:
                    try:
                        ids.append(self.submit(prompt, p))
                        break
                    except QueueFull:
                        advance()
                streams.append(self._streams[ids[-1]])
            while len(reasons) < len(ids):
                advance()
        finally:
            for request_id in ids:
                self.cancel(request_id)
            self._unread = others
        return [
            _output(prompt, stream, reasons[request_id])
            for prompt, stream, request_id in zip(batch, streams, ids, strict=True)
        ]

    def score(self, token_ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """float32 [T, vocab]: row t is the log-probability of every token t+1 given tokens 0..t.

        chunk: tokens a step, for tests; results do not depend on it in deterministic mode.
        """
        self._check_tokens(token_ids)
        return self._backend.score([int(t) for t in token_ids], chunk)

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        bad = next((t for t in token_ids if not 0 <= t < self.config.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token_ids: found {bad}, expected 0 to {self.config.vocab_size - 1}")

    def close(self) -> None:
        """End the engine and whatever processes it has. May be called twice."""
        self._streams.clear()
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _output(prompt: Prompt, stream: _Stream, reason: Any) -> RequestOutput:
    logprobs = stream.logprobs if stream.request.params.logprobs is not None else None
    completion = CompletionOutput(0, "".join(stream.text), stream.tokens, reason, logprobs, stream.cumulative)  # type: ignore[arg-type]
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput(stream.request.request_id, text, list(stream.request.token_ids), [completion])
