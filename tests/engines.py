"""Engines in this process for tests, and what a set of requests gives on them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import load_params, open_checkpoint
from moe_jax.engine import Engine
from moe_jax.llm import engine_config, model_directory
from moe_jax.mesh import ExpertMesh, primary_slots
from moe_jax.request import Request, SamplingParams

SMALL: dict[str, Any] = {"max_batch": 16, "max_prefill_rows": 32, "max_model_len": 512, "num_pages": 64}


def make_engine(model: str | Path = "demo", ranks: int = 1, warm_up: bool = True, **options: Any) -> Engine:
    """`ranks` virtual devices of this process (tests/conftest.py makes four), small buckets, logits kept."""
    checkpoint = open_checkpoint(model_directory(model))
    config = engine_config(checkpoint.config, ranks, "cpu", **(SMALL | {"return_logits": True} | options))
    slots = primary_slots(checkpoint.config.num_experts, ranks, config.slots_for(checkpoint.config.num_experts))
    slot_experts = np.stack([slots] * checkpoint.config.num_moe_layers, axis=1)
    mesh = ExpertMesh(tuple(jax.devices()[:ranks]))
    engine = Engine(
        checkpoint.config,
        config,
        mesh,
        slot_experts,
        lambda i, device: load_params(checkpoint, slot_experts[i], device, config.dtype),
    )
    if warm_up:
        engine.warm_up()
    return engine


def request(
    name: str, prompt: list[int], max_tokens: int = 8, output: list[int] | None = None, **params: Any
) -> Request:
    params = {"temperature": 0.0, "ignore_eos": True, "seed": 7} | params
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), output or ())


def run(engine: Engine, requests: list[Request], rank: int | None = None) -> dict[str, list[int]]:
    """Serve them, spread over the ranks or all on one. The tokens of each; logits are in engine.logits."""
    out: dict[str, list[int]] = {r.request_id: list(r.output_ids) for r in requests}
    for i, r in enumerate(requests):
        engine.add(i % len(engine.ranks) if rank is None else rank, r)
    while engine.has_work:
        for event in engine.step():
            assert event.index == len(out[event.request_id])
            out[event.request_id].append(event.token)
    return out
