"""Small random models of every family, written by `transformers`, and what `transformers` says about them.

    make("deepseek_v3", path, "grouped", seed=0)     # a checkpoint directory
    logprobs(path, token_ids)                        # float32 [T, vocab]
    greedy(path, [[1, 2, 3]], n=8)                   # lists of token ids

Weights are drawn larger than models are initialised, so that routing and attention are far from uniform.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB, HIDDEN, EXPERTS = 128, 64, 8

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA = {
    "n_routed_experts": EXPERTS,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 48, "num_key_value_heads": 2},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 48, "num_key_value_heads": 4},
    "deepseek_v2": {**_MLA, "n_shared_experts": 2},
    "deepseek_v3": {**_MLA, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0},
}


def _yarn(**more: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **more,
    }


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_moe": {
        "plain": {},
        "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "norm_topk_prob": False},
        "mqa_bias": {"num_key_value_heads": 1, "attention_bias": True, "rope_parameters": {"rope_theta": 1e6}},
        "dense_layers": {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]},
        "sparse_step": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "num_experts_per_tok": 3},
        "yarn": {"rope_parameters": _yarn()},
    },
    "mixtral": {
        "plain": {},
        "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
        "llama3_rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    },
    "olmoe": {
        "plain": {},
        "clip_normalized": {"clip_qkv": 0.8, "norm_topk_prob": True},
        "gqa_linear_rope": {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
    "deepseek_v2": {
        "greedy": {"topk_method": "greedy"},
        "groups": {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "q_lora_rank": 24,
            "num_experts_per_tok": 3,
        },
        "yarn": {"rope_parameters": _yarn(mscale=0.7, mscale_all_dim=1.2), "rms_norm_eps": 1e-3},
    },
    "deepseek_v3": {
        "plain": {},
        "groups": {"n_group": 4, "topk_group": 2, "q_lora_rank": 24, "n_shared_experts": 2, "num_experts_per_tok": 3},
        "unnormalized": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        "yarn": {"rope_parameters": _yarn(mscale=0.7, mscale_all_dim=1.2), "q_lora_rank": 24, "attention_bias": True},
        "not_interleaved": {"rope_interleave": False, "first_k_dense_replace": 2, "rms_norm_eps": 1e-3},
    },
}
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def make(
    family: str,
    path: Path,
    variant: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random model to `path` as `transformers` saves it, one tensor an expert."""
    fields = {**_SMALL, **_FAMILIES[family], **(VARIANTS[family][variant] if variant else {}), **overrides}
    config = transformers.AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                _randomize(name, tensor)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def _randomize(name: str, tensor: torch.Tensor) -> None:
    if name.endswith("inv_freq"):
        return
    if name.endswith("e_score_correction_bias"):
        tensor.normal_(0, 0.3)
    elif "norm" in name:
        tensor.uniform_(0.5, 1.5)
    elif tensor.ndim == 1:
        tensor.normal_(0, 0.2)
    elif name.endswith("gate.weight"):
        tensor.normal_(0, 0.3)
    elif "embed_tokens" in name:
        tensor.normal_(0, 0.5)
    else:
        tensor.normal_(0, 0.15)


def fuse_experts(path: Path) -> None:
    """Rewrite a single-file checkpoint: experts of a layer in two 3-D tensors, as `transformers` holds them."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    pattern = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+?)\.weight")
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(tensors):
        if match := pattern.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensors.pop(name)
    for layer, matrices in experts.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in matrices else ("gate_proj", "up_proj", "down_proj")
        n = len(matrices[down])
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([matrices[gate][e], matrices[up][e]]) for e in range(n)]
        )
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack([matrices[down][e] for e in range(n)])
    save_file({name.replace(".block_sparse_moe.", ".mlp."): t for name, t in tensors.items()}, file, {"format": "pt"})


def edit_config(path: Path, remove: tuple[str, ...] = (), **fields: Any) -> None:
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in raw.items() if name not in remove}))


@cache
def _model(path: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def logprobs(path: Path, token_ids: list[int]) -> np.ndarray:
    """float32 [T, vocab]: row t is the log-probability of token t+1 given 0..t."""
    with torch.no_grad():
        logits = _model(path)(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).numpy()


def greedy(path: Path, prompts: list[list[int]], n: int) -> list[list[int]]:
    """`n` tokens after each prompt; no stop token."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = _model(path).generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
