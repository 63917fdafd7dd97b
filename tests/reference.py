"""A plain forward pass in numpy, from a ModelConfig and a pytree of parameters: slow, and meant to be obviously right.

No cache, no batch, no sharding: every token of one sequence at once, every expert on its own tokens.
"""

from typing import Any

import numpy as np

from moe_jax.config import ModelConfig

Array = np.ndarray


def logprobs(config: ModelConfig, params: dict[str, Any], token_ids: list[int], dtype: Any = np.float64) -> Array:
    """[T, vocab]: row t is the log-probability of token t+1 given 0..t. Slot e of every layer must hold expert e."""
    c = config
    p = _cast(params, dtype)
    x = p["embed"][np.asarray(token_ids)]
    for segment, (moe, _, layers) in zip(p["segments"], c.segments, strict=True):
        for i in range(layers):
            layer = {name: stacked[i] for name, stacked in segment.items()}
            attend = _latent_attention if c.latent else _attention
            x = x + attend(c, layer, _norm(x, layer["attn_norm"], c.rms_norm_eps))
            h = _norm(x, layer["mlp_norm"], c.rms_norm_eps)
            x = x + (_moe(c, layer, h) if moe else _mlp(h, layer["gate_up"], layer["down"]))
    logits = _norm(x, p["final_norm"], c.rms_norm_eps) @ p["lm_head"]
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _cast(tree: Any, dtype: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _cast(value, dtype) for name, value in tree.items()}
    return [_cast(value, dtype) for value in tree] if isinstance(tree, list) else np.asarray(tree).astype(dtype)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _mlp(x: Array, gate_up: Array, down: Array) -> Array:
    gate, up = np.split(x @ gate_up, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def _rotate(c: ModelConfig, x: Array) -> Array:
    """x: [T, heads, rope.dim], row t at position t."""
    angles = np.arange(len(x))[:, None] * np.asarray(c.rope.inverse_frequencies())  # [T, dim / 2]
    cos, sin = (f(angles)[:, None] * c.rope.attention_factor for f in (np.cos, np.sin))
    if c.rope.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attend(c: ModelConfig, q: Array, k: Array, v: Array) -> Array:
    """q, k: [T, heads, d], v: [T, heads, e] -> [T, heads * e]."""
    scores = np.einsum("qhd,khd->hqk", q, k) * c.attention_scale
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    return np.einsum("hqk,khe->qhe", _softmax(scores), v).reshape(len(q), -1)


def _attention(c: ModelConfig, p: dict[str, Array], x: Array) -> Array:
    qkv = x @ p["qkv"] + p.get("qkv_bias", 0)
    sizes = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim]
    q, k, v = np.split(qkv, [sizes[0], sizes[0] + sizes[1]], axis=-1)
    if c.qk_norm == "full":
        q, k = _norm(q, p["q_norm"], c.rms_norm_eps), _norm(k, p["k_norm"], c.rms_norm_eps)
    if c.clip_qkv is not None:
        q, k, v = (np.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
    q, k, v = (a.reshape(len(x), -1, c.head_dim) for a in (q, k, v))
    if c.qk_norm == "head":
        q, k = _norm(q, p["q_norm"], c.rms_norm_eps), _norm(k, p["k_norm"], c.rms_norm_eps)
    k, v = (np.repeat(a, c.num_heads // c.num_kv_heads, axis=1) for a in (k, v))
    return _attend(c, _rotate(c, q), _rotate(c, k), v) @ p["o"] + p.get("o_bias", 0)


def _latent_attention(c: ModelConfig, p: dict[str, Array], x: Array) -> Array:
    m = c.latent
    assert m is not None
    if m.q_rank is None:
        q = x @ p["q"]
    else:
        q = _norm(x @ p["q_a"] + p.get("q_a_bias", 0), p["q_a_norm"], m.norm_eps) @ p["q_b"]
    q_nope, q_rope = np.split(q.reshape(len(x), c.num_heads, -1), [m.nope_dim], axis=-1)
    latent, k_rope = np.split(x @ p["kv_a"] + p.get("kv_a_bias", 0), [m.kv_rank], axis=-1)
    latent = _norm(latent, p["kv_a_norm"], m.norm_eps)
    k_nope = np.einsum("tr,hnr->thn", latent, p["k_up"])
    v = np.einsum("tr,hrv->thv", latent, p["v_up"])
    k_rope = np.repeat(_rotate(c, k_rope[:, None]), c.num_heads, axis=1)
    q, k = np.concatenate([q_nope, _rotate(c, q_rope)], -1), np.concatenate([k_nope, k_rope], -1)
    return _attend(c, q, k, v) @ p["o"] + p.get("o_bias", 0)


def route(c: ModelConfig, p: dict[str, Array], x: Array) -> Array:
    """[T, experts]: the weight of each expert for each token, 0 for those that are not chosen."""
    logits = x @ p["router"]
    scores = 1 / (1 + np.exp(-logits)) if c.scoring == "sigmoid" else _softmax(logits)
    biased = scores + p.get("router_bias", 0)
    groups = biased.reshape(len(x), c.num_groups, -1)
    best = np.sort(groups, axis=-1)[..., -2:].sum(-1) if c.group_score == "top2" else groups.max(-1)
    allowed = np.zeros(groups.shape, bool)
    np.put_along_axis(allowed, np.argsort(-best, axis=-1, kind="stable")[:, : c.top_groups, None], True, axis=1)
    choice = np.where(allowed.reshape(biased.shape), biased, -np.inf)
    chosen = np.argsort(-choice, axis=-1, kind="stable")[:, : c.top_k]
    weights = np.zeros_like(scores)
    np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, -1), -1)
    if c.normalize_weights:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights * c.routed_scale


def _moe(c: ModelConfig, p: dict[str, Array], x: Array) -> Array:
    weights = route(c, p, x)
    y = np.zeros_like(x)
    for e in range(c.num_experts):
        rows = np.flatnonzero(weights[:, e])
        y[rows] += weights[rows, e, None] * _mlp(x[rows], p["experts_gate_up"][e], p["experts_down"][e])
    if c.shared_intermediate_size:
        y = y + _mlp(x, p["shared_gate_up"], p["shared_down"])
    return y
