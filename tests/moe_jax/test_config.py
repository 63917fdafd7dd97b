"""config.json, in old and new spellings, whole and broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_jax.config import ConfigError, ModelConfig, parse_hugging_face
from tests import configs

QWEN = configs.QWEN
DEEPSEEK = {
    **{name: value for name, value in QWEN.items() if name not in ("num_experts", "num_key_value_heads")},
    "model_type": "deepseek_v3",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_count_of_experts_has_three_names(name: str) -> None:
    raw = {k: v for k, v in QWEN.items() if k != "num_experts"}
    assert parse_hugging_face({**raw, name: 8}) == parse_hugging_face(QWEN)


def test_old_and_new_spelling_of_rope() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1024}
    old = parse_hugging_face({**QWEN, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **yarn}})
    new = parse_hugging_face({**QWEN, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}})
    assert old == new
    assert old.rope.theta == 1e6 and old.rope.attention_factor == pytest.approx(1.1386294)
    without_factor = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 1024}
    assert parse_hugging_face({**QWEN, "rope_parameters": without_factor}) == new


def test_what_transformers_takes_for_granted() -> None:
    mixtral = {k: v for k, v in QWEN.items() if k not in ("moe_intermediate_size", "num_key_value_heads")}
    found = parse_hugging_face({**mixtral, "model_type": "mixtral", "num_attention_heads": 16})
    assert (found.rms_norm_eps, found.rope.theta, found.num_kv_heads) == (1e-5, 1e6, 8)
    assert found.normalize_weights and found.moe_intermediate_size == 48
    silent = ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace")
    v3 = parse_hugging_face({**{k: v for k, v in DEEPSEEK.items() if k not in silent}, "n_routed_experts": 32})
    assert (v3.num_groups, v3.top_groups, v3.routed_scale, v3.normalize_weights) == (8, 4, 2.5, True)
    assert v3.moe_layers == (False, False, False, True)


def test_dense_layers_stand_anywhere() -> None:
    config = parse_hugging_face({**QWEN, "mlp_only_layers": [1]})
    assert config.moe_layers == (True, False, True, True)
    assert config.segments == ((True, 0, 1), (False, 1, 1), (True, 2, 2))
    assert parse_hugging_face({**QWEN, "decoder_sparse_step": 2}).moe_layers == (False, True, False, True)
    assert parse_hugging_face(DEEPSEEK).segments == ((False, 0, 1), (True, 1, 3))


def test_deepseek_v2_uses_groups_only_where_it_says_so() -> None:
    raw = {**DEEPSEEK, "model_type": "deepseek_v2"}
    assert parse_hugging_face({**raw, "topk_method": "greedy"}).num_groups == 1
    grouped = parse_hugging_face({**raw, "topk_method": "group_limited_greedy"})
    assert (grouped.num_groups, grouped.top_groups, grouped.group_score) == (4, 2, "max")


def test_a_sliding_window_limits_the_positions() -> None:
    assert parse_hugging_face({**QWEN, "sliding_window": 128}).max_position == 4096
    assert parse_hugging_face({**QWEN, "sliding_window": 128, "use_sliding_window": True}).max_position == 128


@pytest.mark.parametrize(
    ("raw", "changes", "message"),
    [
        (QWEN, {"model_type": "llama"}, "model_type 'llama' is not supported; expected one of qwen3_moe"),
        (QWEN, {"model_type": None}, "model_type None is not supported"),
        (QWEN, {"hidden_size": None}, "hidden_size: expected an integer of at least 1, found None"),
        (QWEN, {"num_experts": None}, "num_experts or num_local_experts or n_routed_experts: expected an integer"),
        (QWEN, {"num_hidden_layers": "4"}, "num_hidden_layers: expected an integer of at least 1, found '4'"),
        (QWEN, {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the number of experts 8"),
        (QWEN, {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (QWEN, {"rms_norm_eps": "small"}, "rms_norm_eps: expected a number, found 'small'"),
        (QWEN, {"mlp_only_layers": 3}, "mlp_only_layers: expected a list of layers, found 3"),
        (QWEN, {"rope_scaling": [1]}, "rope_scaling or rope_parameters: expected an object"),
        (QWEN, {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        (QWEN, {"rope_scaling": {"type": "linear"}}, "factor: expected a number, found None"),
        (QWEN, {"head_dim": 7}, "found dimension 7"),
        (QWEN, {"eos_token_id": "x"}, "eos_token_id: expected an integer"),
        (DEEPSEEK, {"kv_lora_rank": None}, "kv_lora_rank: expected an integer"),
        (DEEPSEEK, {"n_group": 3}, "n_group 3, topk_group 2 do not fit 8 experts, top 2"),
        (DEEPSEEK, {"n_group": 8}, "n_group 8: expected at least 2 of the 8 experts in a group"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_json(tmp_path)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object"), (None, "cannot")]
)
def test_a_file_that_is_no_config(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(tmp_path)
