"""The forward pass of one rank in one step, for every family.

Runs inside `shard_map`: everything here is a rank's own, except what goes through `moe.Dispatch`. Families differ in
the fields of ModelConfig; there is one body. Layers are scanned, so compile time does not grow with depth.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.attention import Cache, Entries, attend, attend_gathered
from moe_jax.config import ModelConfig, Rope
from moe_jax.kernels.expert_ffn import expert_ffn, expert_ffn_reference
from moe_jax.moe import Dispatch, moe, route
from moe_jax.reduce import ordered_sum
from moe_jax.tiles import map_tiles

Params = dict[str, Any]
Turn = tuple[jax.Array, jax.Array]  # `rotary`


@dataclass(frozen=True)
class Run:
    """What is fixed when a step is compiled."""

    model: ModelConfig
    dispatch: Dispatch
    dtype: Any
    row_tile: int
    expert_tile: int
    prefill: bool
    deterministic: bool
    reference: bool = False  # plain JAX where there is a kernel
    # No loop whose length is data. On a GPU the host would wait for it in the middle of the step, and XLA cannot abort
    # a lost peer's communicator while it does: "lockable.h: Check failed" (seen in jax 0.11.2).
    straight: bool = False

    @property
    def tile(self) -> int | None:
        """For `map_tiles`."""
        return self.row_tile if self.deterministic and not self.straight else None

    def tiles(self, f: Any, count: jax.Array, *rows: Any) -> Any:
        return map_tiles(f, self.tile, count, *rows)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Over the last axis, in float32 (Zhang and Sennrich 2019)."""
    f = x.astype(jnp.float32)
    return (f * lax.rsqrt(ordered_sum(f * f, -1)[..., None] / f.shape[-1] + eps)).astype(x.dtype) * weight


def rotary(position: jax.Array, rope: Rope) -> Turn:
    """cos and sin [n, 1, dim / 2] at positions [n]."""
    angle = position[:, None].astype(jnp.float32) * np.asarray(rope.inverse_frequencies(), np.float32)
    return jnp.cos(angle)[:, None] * rope.attention_factor, jnp.sin(angle)[:, None] * rope.attention_factor


def rotate(x: jax.Array, turn: Turn, rope: Rope) -> jax.Array:
    """Rotary embedding of x [n, heads, dim]. Interleaved pairs come out de-interleaved, in queries and keys alike,
    which leaves their products as they are."""
    cos, sin = turn
    f = x.astype(jnp.float32)
    a, b = (f[..., 0::2], f[..., 1::2]) if rope.interleaved else jnp.split(f, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down


def project(c: ModelConfig, p: Params, x: jax.Array, turn: Turn) -> tuple[jax.Array, Cache]:
    """Scaled queries [n, heads, head_dim] and the rows' new keys and values, grouped-query attention."""
    n = x.shape[0]
    h = rms_norm(x, p["attn_norm"], c.rms_norm_eps) @ p["qkv"] + p.get("qkv_bias", 0)
    q, k, v = jnp.split(h, [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim], axis=-1)
    if c.qk_norm == "full":
        q, k = rms_norm(q, p["q_norm"], c.rms_norm_eps), rms_norm(k, p["k_norm"], c.rms_norm_eps)
    if c.clip_qkv is not None:
        q, k, v = (jnp.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
    q, k, v = (a.reshape(n, -1, c.head_dim) for a in (q, k, v))
    if c.qk_norm == "head":
        q, k = rms_norm(q, p["q_norm"], c.rms_norm_eps), rms_norm(k, p["k_norm"], c.rms_norm_eps)
    return rotate(q, turn, c.rope) * c.attention_scale, {"k": rotate(k, turn, c.rope), "v": v}


def project_latent(c: ModelConfig, p: Params, x: jax.Array, turn: Turn) -> tuple[jax.Array, Cache]:
    """The same with latent attention, absorbed: queries [n, heads, kv_rank + rope_dim] meet the latent itself."""
    m = c.latent
    assert m is not None
    n = x.shape[0]
    h = rms_norm(x, p["attn_norm"], c.rms_norm_eps)
    if m.q_rank is None:
        q = h @ p["q"]
    else:
        q = rms_norm(h @ p["q_a"] + p.get("q_a_bias", 0), p["q_a_norm"], m.norm_eps) @ p["q_b"]
    q = q.reshape(n, c.num_heads, c.head_dim)
    latent, k_rope = jnp.split(h @ p["kv_a"] + p.get("kv_a_bias", 0), [m.kv_rank], axis=-1)
    latent = rms_norm(latent, p["kv_a_norm"], m.norm_eps)
    q_latent = jnp.einsum("nhd,hdr->nhr", q[..., : m.nope_dim], p["k_up"])
    q_rope = rotate(q[..., m.nope_dim :], turn, c.rope)
    k = jnp.concatenate([latent[:, None], rotate(k_rope[:, None], turn, c.rope)], axis=-1)
    return jnp.concatenate([q_latent, q_rope], axis=-1) * c.attention_scale, {"k": k}


def layer(
    run: Run,
    p: Params,
    experts: Params | None,
    table: jax.Array,
    x: jax.Array,
    index: jax.Array,
    within: jax.Array,
    cache: Cache,
    e: Entries,
    position: jax.Array,
    turn: Turn,
    real: jax.Array,
) -> tuple[jax.Array, Cache]:
    """One layer over the rows x [T, H]; real [T] tells rows from padding. `index` counts the model's layers, `within`
    the segment's. experts and table are the segment's. Returns x and the layer's new keys and values."""
    c = run.model
    qkv = project_latent if c.latent else project
    q, new = run.tiles(lambda x, turn: qkv(c, p, x, turn), e.num_tiles, x, turn)
    value_dim = c.latent.kv_rank if c.latent else c.head_dim
    if run.straight:
        a = attend_gathered(q, new, cache, index, position, e, value_dim, run.row_tile, run.prefill)
    else:
        a = attend(q, new, cache, index, position, e, value_dim, run.tile, run.row_tile, run.prefill)

    def after_attention(x: jax.Array, a: jax.Array) -> Any:
        if c.latent:
            a = jnp.einsum("nhr,hrv->nhv", a, p["v_up"])
        x = x + a.reshape(x.shape[0], -1) @ p["o"] + p.get("o_bias", 0)
        h = rms_norm(x, p["mlp_norm"], c.rms_norm_eps)
        if experts is None:
            return x + swiglu(h, p["gate_up"], p["down"])
        ids, weights = route(c, h, p["router"], p.get("router_bias"))
        shared = swiglu(h, p["shared_gate_up"], p["shared_down"]) if c.shared_intermediate_size else 0
        return x + shared, h, ids, weights

    after = run.tiles(after_attention, e.num_tiles, x, a)
    if experts is None:
        return after, new
    x, h, ids, weights = after
    y = moe(
        h,
        jnp.where(real[:, None], ids, -1),
        weights,
        experts["experts_gate_up"],
        experts["experts_down"],
        within,
        table[within],
        run.dispatch,
        run.expert_tile,
        spread=run.prefill,
        ffn=expert_ffn_reference if run.reference or run.straight else expert_ffn,
        deterministic=run.deterministic,
    )
    return x + y, new


def forward(
    run: Run,
    params: Params,
    table: jax.Array,
    cache: Cache,
    token: jax.Array,
    position: jax.Array,
    e: Entries,
    real: jax.Array,
) -> tuple[jax.Array, Cache]:
    """token, position, real [T]; table [moe layers, E, R]. Returns the last hidden states [T, H], before the final
    norm, and the new keys and values [layers, T, kv_heads, dim]."""
    x = params["embed"][token].astype(run.dtype)
    turn = rotary(position, run.model.rope)
    news, first_moe = [], 0
    for p, (has_experts, first, layers) in zip(params["segments"], run.model.segments, strict=True):
        # Expert weights are cut out of their stack where they are used: scanned, every slot would be copied.
        experts = {name: a for name, a in p.items() if name.startswith("experts_")} if has_experts else None
        rest = {name: a for name, a in p.items() if not name.startswith("experts_")}
        tables = table[first_moe : first_moe + layers]
        first_moe += layers * has_experts

        def body(
            x: jax.Array, scanned: Any, experts: Any = experts, tables: jax.Array = tables, first: int = first
        ) -> Any:
            p, within = scanned
            return layer(run, p, experts, tables, x, first + within, within, cache, e, position, turn, real)

        x, new = lax.scan(body, x, (rest, jnp.arange(layers)))
        news.append(new)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *news)


def logits(run: Run, params: Params, x: jax.Array, count: jax.Array) -> jax.Array:
    """float32 [n, V] of hidden states [n, H], the first `count` of them."""

    def head(x: jax.Array) -> jax.Array:
        h = rms_norm(x, params["final_norm"], run.model.rms_norm_eps)
        return jnp.dot(h, params["lm_head"], preferred_element_type=jnp.float32)

    return run.tiles(head, (count + run.row_tile - 1) // run.row_tile, x)
