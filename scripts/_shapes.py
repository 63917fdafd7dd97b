"""The shapes of published models, for benchmarks with random weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from moe_jax.llm import model_directory

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=6144,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_theta=1e6,
    ),
    "deepseek-v3": dict(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        moe_intermediate_size=2048,
        intermediate_size=18432,
        max_position_embeddings=163840,
        rope_theta=1e4,
    ),
}
FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write_shape(name: str, layers: int | None, directory: Path, float8: bool = False) -> Path:
    """A directory with the shape's config.json. float8: of experts."""
    if name == "demo":
        raw = json.loads((model_directory("demo") / "config.json").read_text())
    else:
        raw = SHAPES[name] | {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    if layers is not None:
        raw |= {"num_hidden_layers": layers}
    if float8:
        raw |= {"quantization_config": FLOAT8}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def write_model(name: str, layers: int | None, directory: Path) -> Path:
    """The shape's directory, with the demo's tokenizer, which knows the first of its tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory("demo") / file, directory)
    return write_shape(name, layers, directory)


def add_model_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo", help="random weights, but for the demo")
    parser.add_argument("--layers", type=int, help="of the shape: fewer; of the demo's, too, then with random weights")
