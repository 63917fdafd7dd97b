"""Memory planning, in numbers alone."""

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import ConfigError, EngineConfig, parse_hugging_face
from moe_jax.dummy_checkpoint import DummyCheckpoint
from moe_jax.executables import resolve
from moe_jax.llm import engine_config
from moe_jax.memory import pages_that_fit, position_bytes, weight_bytes, workspace_bytes

GIB = 1 << 30
QWEN: dict[str, Any] = json.loads("""{
  "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
  "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
  "moe_intermediate_size": 768, "intermediate_size": 6144, "max_position_embeddings": 40960}""")
MODEL = parse_hugging_face(QWEN)
FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_weights_of_a_known_model() -> None:
    config = EngineConfig(dtype="bfloat16", deterministic=False)
    assert weight_bytes(MODEL, config) == pytest.approx(2 * 30.5e9, rel=0.01)  # 30.5 billion parameters
    assert position_bytes(MODEL, config) == 2 * 48 * 4 * 128 * 2
    two = EngineConfig(ranks=2, dtype="bfloat16", deterministic=False)
    assert weight_bytes(MODEL, two) < 0.55 * weight_bytes(MODEL, config)


def test_weights_of_8_bit_experts() -> None:
    """A byte each, and four for the scale of a block; two where a GPU's kernels multiply no such experts."""
    model = parse_hugging_face(QWEN | {"quantization_config": FLOAT8})
    config = EngineConfig(dtype="bfloat16", deterministic=False)
    checkpoint = DummyCheckpoint(model, np.dtype(ml_dtypes.bfloat16))
    wide, kernels = resolve(checkpoint, config, "NVIDIA A100")
    assert kernels == "xla" and weight_bytes(wide.config, config) == weight_bytes(MODEL, config)
    experts = 48 * 128 * 3 * 2048 * 768
    assert weight_bytes(MODEL, config) - weight_bytes(model, config) == experts - 4 * experts // 128**2


@given(memory=st.integers(64 * GIB, 200 * GIB), max_batch=st.sampled_from([16, 64, 256]))
def test_what_is_planned_fits(memory: int, max_batch: int) -> None:
    try:
        config = engine_config(MODEL, 1, "gpu", memory, max_batch=max_batch)
    except ConfigError as e:
        needed = float(re.search(r"at least ([\d.]+) GiB", str(e))[1]) * GIB  # type: ignore[index]
        assert memory < needed
        return
    page = position_bytes(MODEL, config) * config.page_size
    taken = weight_bytes(MODEL, config) + workspace_bytes(MODEL, config) + config.num_pages * page
    assert config.pages_per_sequence <= config.num_pages <= max_batch * config.pages_per_sequence
    assert taken <= memory and (memory - taken < page or config.num_pages == max_batch * config.pages_per_sequence)


def test_what_is_asked_for_and_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="memory: found 40.00 GiB .* weights 56.89 GiB, .* use more ranks"):
        engine_config(MODEL, 1, "gpu", 40 * GIB)
    fit = pages_that_fit(MODEL, EngineConfig(max_batch=256, max_prefill_rows=8192, dtype="bfloat16"), 80 * GIB)
    assert engine_config(MODEL, 1, "gpu", 80 * GIB, num_pages=fit).num_pages == fit
    with pytest.raises(ConfigError, match=f"num_pages: found {fit + 1}, expected at most {fit}"):
        engine_config(MODEL, 1, "gpu", 80 * GIB, num_pages=fit + 1)
    assert engine_config(MODEL, 1, "cpu").num_pages == 32 * 16  # where memory is not known
