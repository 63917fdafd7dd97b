"""Engines in this process for tests, and what a set of requests gives on them."""

import os
from pathlib import Path
from typing import Any

import jax

from moe_jax.checkpoint import open_checkpoint
from moe_jax.engine import Engine
from moe_jax.llm import engine_config, model_directory
from moe_jax.local import local_engine
from moe_jax.programs import ProgramStore
from moe_jax.request import Request, SamplingParams
from serving.environment import compilation_cache

# Each engine would compile anew what another of the same shape has compiled.
PROGRAMS = ProgramStore(compilation_cache("cpu", Path(__file__).parents[1] / ".cache" / "programs", os.environ))
SMALL: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32, "max_model_len": 512, "num_pages": 64}


def make_engine(model: str | Path = "demo", ranks: int = 1, warm_up: bool = True, **options: Any) -> Engine:
    """`ranks` virtual devices of this process (tests/conftest.py makes four), small buckets, logits kept."""
    checkpoint = open_checkpoint(model_directory(model))
    config = engine_config(checkpoint.config, ranks, "cpu", **(SMALL | {"return_logits": True} | options))
    engine = local_engine(checkpoint, config, jax.devices()[:ranks], PROGRAMS)
    if warm_up:
        engine.warm_up()
    return engine


def request(
    name: str, prompt: list[int], max_tokens: int = 8, output: list[int] | None = None, **params: Any
) -> Request:
    params = {"temperature": 0.0, "ignore_eos": True, "seed": 7} | params
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), output or ())


def run(engine: Engine, requests: list[Request], rank: int | None = None, ahead: bool = False) -> dict[str, list[int]]:
    """Serve them, spread over the ranks or all on one; `ahead`: a step is begun before the last one is finished.
    The tokens of each; logits are in engine.logits."""
    out: dict[str, list[int]] = {r.request_id: list(r.output_ids) for r in requests}
    for i, r in enumerate(requests):
        engine.add(i % len(engine.ranks) if rank is None else rank, r)
    while engine.has_work:
        for event in engine.step(ahead):
            assert event.index == len(out[event.request_id])
            out[event.request_id].append(event.token)
    return out
