"""The parameters of a model, each described once: shape, place in the pytree, names on disk, and how to build it.

Everything that handles parameters (loading, dummy weights, sharding, converting, counting bytes) walks it.
It knows neither files nor JAX.

A model is {"embed", "final_norm", "lm_head", "segments": [layer dict, ...]}. Layers of a segment (a run of like layers,
`ModelConfig.segments`) are stacked along a leading axis, so that the model can scan them. Matrices are [in, out].
Expert matrices have one more axis, [layers, slots, in, out], and `slots` is the sharded one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.scratch import scratch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Tensors on disk from which a parameter can be built. Names may contain {layer} and {expert}."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]  # on disk, of all of the tensor
    build: Callable[..., np.ndarray]  # from the arrays, in order, to Param.shape
    fused: bool = False  # tensors hold all experts: `build` gets the slice [expert] of each


@dataclass(frozen=True)
class Param:
    """One parameter of one layer; with `expert`, of one expert of one layer."""

    shape: Shape
    sources: tuple[Source, ...]  # alternatives: the first whose tensors all exist is used
    expert: bool = False
    float32: bool = False  # kept in float32 whatever the rest is
    float8: bool = False  # float8_e4m3fn, to be multiplied with the parameter of the same name and SCALES


LayerParams = dict[str, Param]

SCALES = "_scales"
BLOCK = 128  # rows and columns of 8-bit weights that share a float32 scale


def _transpose(*arrays: np.ndarray) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0].T
    rows = sum(len(a) for a in arrays)
    return np.concatenate(arrays, out=scratch((rows, *arrays[0].shape[1:]), np.result_type(*arrays))).T


def _whole(array: np.ndarray) -> np.ndarray:
    return array


def _vector(name: str, *shape: int, float32: bool = False) -> Param:
    return Param(shape, (Source((name,), (shape,), _whole),), float32=float32)


def _linear(names: str | tuple[str, ...], fan_in: int, *fan_out: int, float32: bool = False) -> Param:
    """[in, out] from one or several [out, in] matrices side by side."""
    names = (names,) if isinstance(names, str) else names
    shapes = tuple((out, fan_in) for out in fan_out)
    return Param((fan_in, sum(fan_out)), (Source(names, shapes, _transpose),), float32=float32)


def _bias(names: tuple[str, ...], *sizes: int) -> Param:
    source = Source(names, tuple((n,) for n in sizes), lambda *a: np.concatenate(a))
    return Param((sum(sizes),), (source,))


def _attention(c: ModelConfig) -> LayerParams:
    at = "model.layers.{layer}.self_attn."
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    p = {
        "attn_norm": _vector("model.layers.{layer}.input_layernorm.weight", c.hidden_size),
        "qkv": _linear(tuple(f"{at}{x}_proj.weight" for x in "qkv"), c.hidden_size, q, kv, kv),
        "o": _linear(f"{at}o_proj.weight", q, c.hidden_size),
    }
    if c.attention_bias:
        p["qkv_bias"] = _bias(tuple(f"{at}{x}_proj.bias" for x in "qkv"), q, kv, kv)
        p["o_bias"] = _bias((f"{at}o_proj.bias",), c.hidden_size)
    if c.qk_norm != "none":
        p["q_norm"] = _vector(f"{at}q_norm.weight", c.head_dim if c.qk_norm == "head" else q)
        p["k_norm"] = _vector(f"{at}k_norm.weight", c.head_dim if c.qk_norm == "head" else kv)
    return p


def _latent_attention(c: ModelConfig) -> LayerParams:
    at, m, heads = "model.layers.{layer}.self_attn.", c.latent, c.num_heads
    assert m is not None
    q = heads * c.head_dim

    def split_kv_b(w: np.ndarray) -> np.ndarray:
        return w.reshape(heads, m.nope_dim + m.v_dim, m.kv_rank)

    kv_b = (f"{at}kv_b_proj.weight",), ((heads * (m.nope_dim + m.v_dim), m.kv_rank),)
    p = {
        "attn_norm": _vector("model.layers.{layer}.input_layernorm.weight", c.hidden_size),
        "kv_a": _linear(f"{at}kv_a_proj_with_mqa.weight", c.hidden_size, m.kv_rank + m.rope_dim),
        "kv_a_norm": _vector(f"{at}kv_a_layernorm.weight", m.kv_rank),
        # The up-projections of keys and values are absorbed into queries and outputs.
        "k_up": Param((heads, m.nope_dim, m.kv_rank), (Source(*kv_b, lambda w: split_kv_b(w)[:, : m.nope_dim]),)),
        "v_up": Param(
            (heads, m.kv_rank, m.v_dim), (Source(*kv_b, lambda w: split_kv_b(w)[:, m.nope_dim :].swapaxes(1, 2)),)
        ),
        "o": _linear(f"{at}o_proj.weight", heads * m.v_dim, c.hidden_size),
    }
    if m.q_rank is None:
        p["q"] = _linear(f"{at}q_proj.weight", c.hidden_size, q)
    else:
        p["q_a"] = _linear(f"{at}q_a_proj.weight", c.hidden_size, m.q_rank)
        p["q_a_norm"] = _vector(f"{at}q_a_layernorm.weight", m.q_rank)
        p["q_b"] = _linear(f"{at}q_b_proj.weight", m.q_rank, q)
    if c.attention_bias:
        p["kv_a_bias"] = _bias((f"{at}kv_a_proj_with_mqa.bias",), m.kv_rank + m.rope_dim)
        p["o_bias"] = _bias((f"{at}o_proj.bias",), c.hidden_size)
        if m.q_rank is not None:
            p["q_a_bias"] = _bias((f"{at}q_a_proj.bias",), m.q_rank)
    return p


def _mlp(prefix: str, hidden: int, inner: int) -> LayerParams:
    return {
        "gate_up": _linear((f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"), hidden, inner, inner),
        "down": _linear(f"{prefix}down_proj.weight", inner, hidden),
    }


def _moe(c: ModelConfig) -> LayerParams:
    mixtral = c.model_type == "mixtral"
    hidden, inner, n = c.hidden_size, c.moe_intermediate_size, c.num_experts
    at = "model.layers.{layer}.block_sparse_moe." if mixtral else "model.layers.{layer}.mlp."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    one = at + "experts.{expert}."
    fused = "model.layers.{layer}.mlp.experts."  # how new versions of transformers may write them, for every family
    gates = dict.fromkeys((f"{at}gate.weight", "model.layers.{layer}.mlp.gate.weight"))
    router = tuple(Source((gate,), ((n, hidden),), _transpose) for gate in gates)
    p = {
        "router": Param((hidden, n), router, float32=True),
        "experts_gate_up": Param(
            (hidden, 2 * inner),
            (
                Source((f"{one}{gate}.weight", f"{one}{up}.weight"), ((inner, hidden),) * 2, _transpose),
                Source((f"{fused}gate_up_proj",), ((n, 2 * inner, hidden),), _transpose, fused=True),
            ),
            expert=True,
            float8=c.float8_experts,
        ),
        "experts_down": Param(
            (inner, hidden),
            (
                Source((f"{one}{down}.weight",), ((hidden, inner),), _transpose),
                Source((f"{fused}down_proj",), ((n, hidden, inner),), _transpose, fused=True),
            ),
            expert=True,
            float8=c.float8_experts,
        ),
    }
    if c.float8_experts:
        p |= {f"{name}{SCALES}": _scales(p[name]) for name in ("experts_gate_up", "experts_down")}
    if c.routing_bias:
        p["router_bias"] = _vector(f"{at}gate.e_score_correction_bias", n, float32=True)
    if c.shared_intermediate_size:
        shared = _mlp(f"{at}shared_experts.", hidden, c.shared_intermediate_size)
        p |= {f"shared_{name}": param for name, param in shared.items()}
    return p


def _scales(weights: Param) -> Param:
    """The scales of 8-bit weights: a number for each block."""

    def blocks(shape: Shape) -> Shape:
        return (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))

    sources = (
        replace(s, names=tuple(f"{n}_scale_inv" for n in s.names), shapes=tuple(map(blocks, s.shapes)))
        for s in weights.sources
    )
    return Param(blocks(weights.shape), tuple(sources), expert=True, float32=True)


def layer_params(c: ModelConfig, moe: bool) -> LayerParams:
    attention = _latent_attention(c) if c.latent else _attention(c)
    mlp = _moe(c) if moe else _mlp("model.layers.{layer}.mlp.", c.hidden_size, c.intermediate_size)
    norm = {"mlp_norm": _vector("model.layers.{layer}.post_attention_layernorm.weight", c.hidden_size)}
    return attention | norm | mlp


def top_params(c: ModelConfig) -> LayerParams:
    embed = "model.embed_tokens.weight"
    return {
        "embed": _vector(embed, c.vocab_size, c.hidden_size),
        "final_norm": _vector("model.norm.weight", c.hidden_size),
        "lm_head": _linear(embed if c.tie_embeddings else "lm_head.weight", c.hidden_size, c.vocab_size),
    }


def describe(c: ModelConfig) -> dict[str, Any]:
    """The whole pytree, with a Param in each place. Layer Params are of one layer: stacking is the reader's."""
    return {**top_params(c), "segments": [layer_params(c, moe) for moe, _, _ in c.segments]}


def stacked_shapes(c: ModelConfig, slots: int) -> dict[str, Any]:
    """`describe` with each Param replaced by (Param, its stacked shape on a rank with `slots` slots a layer)."""

    def stacked(param: Param, layers: int) -> tuple[Param, Shape]:
        return param, (layers, slots, *param.shape) if param.expert else (layers, *param.shape)

    tree = describe(c)
    segments = [
        {name: stacked(p, layers) for name, p in segment.items()}
        for segment, (_, _, layers) in zip(tree["segments"], c.segments, strict=True)
    ]
    return {**{name: (p, p.shape) for name, p in tree.items() if name != "segments"}, "segments": segments}


def iterate(c: ModelConfig) -> Iterator[tuple[tuple[Any, ...], Param, int, int]]:
    """(path in the pytree, Param, first layer, number of layers); layers 0, 0 for what belongs to no layer."""
    for name, param in top_params(c).items():
        yield (name,), param, 0, 0
    for i, (moe, first, layers) in enumerate(c.segments):
        for name, param in layer_params(c, moe).items():
            yield ("segments", i, name), param, first, layers
