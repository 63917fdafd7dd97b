"""The forward pass of one rank in one step, for every family.

Runs inside `shard_map`: everything here is a rank's own, except what goes through `moe.Dispatch`. Families differ in
the fields of ModelConfig; there is one body. Layers are scanned, so compile time does not grow with depth.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.attention import Cache, Entries, attend, attend_gathered
from moe_jax.config import ModelConfig, Rope
from moe_jax.kernels import native
from moe_jax.kernels.expert_ffn import expert_ffn, expert_ffn_reference
from moe_jax.moe import Dispatch, moe, route, router_logits, router_parts
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
    kernels: str = "xla"  # or "native", "hopper", or "reference": plain JAX where there is a kernel
    # No loop whose length is data. On a GPU the host would wait for it in the middle of the step, and XLA cannot abort
    # a lost peer's communicator while it does: "lockable.h: Check failed" (seen in jax 0.11.2).
    straight: bool = False

    @property
    def tile(self) -> int | None:
        """For `map_tiles`. Native kernels need none: what they compute of a row depends on no other."""
        return self.row_tile if self.deterministic and self.kernels != "native" and not self.straight else None

    @property
    def ordered(self) -> bool:
        """Whether sums go in a fixed order, see `reduce`. On a GPU that takes several kernels in place of one."""
        return self.deterministic or not self.straight

    @property
    def fused(self) -> bool:
        """Whether what lies between the products is done by `kernels.decode`."""
        if self.kernels != "hopper" or self.prefill:
            return False
        from moe_jax.kernels import decode  # Pallas takes its time to import

        return decode.fits(self.model)

    @property
    def ffn(self) -> Any:
        """As expert_ffn."""
        versions = {"native": native.expert_ffn, "xla": expert_ffn_reference if self.straight else expert_ffn}
        return versions.get(self.kernels, expert_ffn_reference)

    def tiles(self, f: Any, count: jax.Array, *rows: Any) -> Any:
        return map_tiles(f, self.tile, count, *rows)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, ordered: bool = True) -> jax.Array:
    """Over the last axis, in float32 (Zhang and Sennrich 2019)."""
    f = x.astype(jnp.float32)
    total = ordered_sum(f * f, -1) if ordered else (f * f).sum(-1)
    return (f * lax.rsqrt(total[..., None] / f.shape[-1] + eps)).astype(x.dtype) * weight


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


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer of a segment, and how its products are computed."""

    run: Run
    params: Params  # the layer's own
    stacks: Params  # the segment's, which native kernels find the layer's in
    index: jax.Array  # of the layer in the segment
    rows: jax.Array  # [] int32: the step's rows that are in use

    def norm(self, x: jax.Array, name: str, eps: float | None = None) -> jax.Array:
        eps = self.run.model.rms_norm_eps if eps is None else eps
        if self.run.fused:
            from moe_jax.kernels import decode

            return decode.norm(x, self.stacks[name], self.index, eps)
        return rms_norm(x, self.params[name], eps, self.run.ordered)

    def dense(
        self, x: jax.Array, name: str, norm: str | None = None, eps: float | None = None, residual: Any = None
    ) -> jax.Array:
        """rms_norm(x) @ weights + bias + residual, [n, out] of x [n, in]; without `norm`, x as it is."""
        bias = f"{name}_bias"
        if self.run.kernels == "native":
            s, eps = self.stacks, self.run.model.rms_norm_eps if eps is None else eps
            weight = None if norm is None else s[norm]
            return native.dense(x, s[name], self.index, self.rows, weight, eps, s.get(bias), residual)
        h = x if norm is None else self.norm(x, norm, eps)
        y = h @ self.params[name] + self.params.get(bias, 0)
        return y if residual is None else residual + y

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The experts' input h [n, H], and its experts and their weights as `moe.route`."""
        c = self.run.model
        if self.run.kernels == "native":
            s = self.stacks
            return native.route(x, s["mlp_norm"], s["router"], s.get("router_bias"), self.index, self.rows, c)
        h = self.norm(x, "mlp_norm")
        return h, *route(c, router_logits(h, self.params["router"]), self.params.get("router_bias"))

    def by_head(self, x: jax.Array, name: str) -> jax.Array:
        """Each head's own product: [n, heads, out] of x [n, heads, in]."""
        if self.run.kernels == "native":
            return native.dense(x, self.stacks[name], self.index, self.rows)
        return jnp.einsum("nhi,hio->nho", x, self.params[name])

    def swiglu(self, x: jax.Array, prefix: str = "", norm: str | None = None, residual: Any = None) -> jax.Array:
        gate, up = jnp.split(self.dense(x, f"{prefix}gate_up", norm), 2, axis=-1)
        return self.dense(jax.nn.silu(gate) * up, f"{prefix}down", residual=residual)


def project(p: Layer, x: jax.Array, turn: Turn) -> tuple[jax.Array, Cache]:
    """Scaled queries [n, heads, head_dim] and the rows' new keys and values, grouped-query attention."""
    c, n = p.run.model, x.shape[0]
    h = p.dense(x, "qkv", "attn_norm")
    if p.run.kernels == "native":
        norms = None if c.qk_norm == "none" else (p.stacks["q_norm"], p.stacks["k_norm"])
        q, k, v = native.split_heads(h, norms, turn, p.index, p.rows, c)
        return q, {"k": k, "v": v}
    if p.run.fused:
        from moe_jax.kernels import decode

        q, k, v = decode.split_heads(h, p.stacks["q_norm"], p.stacks["k_norm"], turn, p.index, c)
        return q, {"k": k, "v": v}
    q, k, v = jnp.split(h, [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim], axis=-1)

    if c.qk_norm == "full":
        q, k = p.norm(q, "q_norm"), p.norm(k, "k_norm")
    if c.clip_qkv is not None:
        q, k, v = (jnp.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
    q, k, v = (a.reshape(n, -1, c.head_dim) for a in (q, k, v))
    if c.qk_norm == "head":
        q, k = p.norm(q, "q_norm"), p.norm(k, "k_norm")
    return rotate(q, turn, c.rope) * c.attention_scale, {"k": rotate(k, turn, c.rope), "v": v}


def project_latent(p: Layer, x: jax.Array, turn: Turn) -> tuple[jax.Array, Cache]:
    """The same with latent attention, absorbed: queries [n, heads, kv_rank + rope_dim] meet the latent itself."""
    c, m, n = p.run.model, p.run.model.latent, x.shape[0]
    assert m is not None
    if m.q_rank is None:
        q = p.dense(x, "q", "attn_norm")
    else:
        q = p.dense(p.dense(x, "q_a", "attn_norm"), "q_b", "q_a_norm", m.norm_eps)
    q = q.reshape(n, c.num_heads, c.head_dim)
    latent, k_rope = jnp.split(p.dense(x, "kv_a", "attn_norm"), [m.kv_rank], axis=-1)
    latent = p.norm(latent, "kv_a_norm", m.norm_eps)
    q_latent = p.by_head(q[..., : m.nope_dim], "k_up")
    q_rope = rotate(q[..., m.nope_dim :], turn, c.rope)
    k = jnp.concatenate([latent[:, None], rotate(k_rope[:, None], turn, c.rope)], axis=-1)
    return jnp.concatenate([q_latent, q_rope], axis=-1) * c.attention_scale, {"k": k}


def layer(
    p: Layer,
    experts: Params | None,
    table: jax.Array,
    x: jax.Array,
    index: jax.Array,
    cache: Cache,
    e: Entries,
    position: jax.Array,
    turn: Turn,
    real: jax.Array,
    decode_items: Any,
) -> tuple[jax.Array, Cache, jax.Array]:
    """One layer over the rows x [T, H]; real [T] tells rows from padding. `index` counts the model's layers, p.index
    the segment's. experts and table are the segment's; decode_items are hopper's, if it is used. Returns x, the layer's
    new keys and values, and the experts that each row chose [T, top_k], -1 for padding; [T, 0] without experts."""
    run, c, scales = p.run, p.run.model, None
    qkv = project_latent if c.latent else project
    q, new = run.tiles(partial(qkv, p), e.num_tiles, x, turn)
    value_dim = c.latent.kv_rank if c.latent else c.head_dim
    if run.kernels == "native":
        a = native.attend(q, new, cache, index, position, e, value_dim, run.row_tile)
    elif run.kernels == "hopper":
        from moe_jax import hopper

        new, scales = new if run.fused else hopper.finite(new), hopper.scales(experts or {})
        a = hopper.attend(q, new, cache, index, decode_items, e, value_dim, run.row_tile, run.prefill, run.fused)
    elif run.straight:
        a = attend_gathered(q, new, cache, index, position, e, value_dim, run.row_tile, run.prefill)
    else:
        a = attend(q, new, cache, index, position, e, value_dim, run.tile, run.row_tile, run.prefill)

    def after_attention(x: jax.Array, a: jax.Array) -> Any:
        if c.latent:
            a = p.by_head(a, "v_up")
        x = p.dense(a.reshape(x.shape[0], -1), "o", residual=x)
        if experts is None:
            return p.swiglu(x, norm="mlp_norm", residual=x)
        h, ids, weights = p.route(x)
        return p.swiglu(h, "shared_", residual=x) if c.shared_intermediate_size else x, h, ids, weights

    if run.fused and experts is not None and run.dispatch.ranks == 1:
        from moe_jax.kernels import decode
        from moe_jax.kernels.hopper_ffn import hopper_ffn

        x = p.dense(a.reshape(x.shape[0], -1), "o", residual=x)
        h = p.norm(x, "mlp_norm")
        scores = jnp.dot(h, p.params["router"], preferred_element_type=jnp.float32)
        slots, weights, ids = decode.route(scores, table, p.index, real, c)
        stacks = experts["experts_gate_up"], experts["experts_down"]
        return hopper_ffn(h, slots, weights, *stacks, p.index, scales=scales, residual=x), new, ids
    after = run.tiles(after_attention, e.num_tiles, x, a)
    if experts is None:
        return after, new, jnp.zeros((x.shape[0], 0), jnp.int32)
    x, h, ids, weights = after
    ids = jnp.where(real[:, None], ids, -1)
    x = moe(
        h,
        ids,
        weights,
        experts["experts_gate_up"],
        experts["experts_down"],
        p.index,
        table[p.index],
        run.dispatch,
        run.expert_tile,
        spread=run.prefill,
        ffn=run.ffn,
        deterministic=run.deterministic,
        residual=x,
        hopper=run.kernels == "hopper",
        scales=scales,
    )
    return x, new, ids


def forward(
    run: Run,
    params: Params,
    table: jax.Array,
    cache: Cache,
    token: jax.Array,
    position: jax.Array,
    e: Entries,
    real: jax.Array,
) -> tuple[jax.Array, Cache, jax.Array]:
    """token, position, real [T]; table [moe layers, E, R]. Returns the last hidden states [T, H], before the final
    norm, the new keys and values [layers, T, kv_heads, dim], and the chosen experts int32 [moe layers, T, top_k], -1
    for padding."""
    x = params["embed"][token].astype(run.dtype)
    turn = rotary(position, run.model.rope)
    rows = e.num_tiles * run.row_tile
    news, chosen, first_moe, decode_items = [], [], 0, None
    if run.kernels == "hopper":
        from moe_jax import hopper

        decode_items, real = hopper.decode_items(position, e), real.astype(jnp.int32)
    for p, (has_experts, first, layers) in zip(params["segments"], run.model.segments, strict=True):
        # Expert weights are cut out of their stack where they are used: scanned, every slot would be copied.
        experts = {name: a for name, a in p.items() if name.startswith("experts_")} if has_experts else None
        rest = {name: a for name, a in p.items() if not name.startswith("experts_")}
        if has_experts and run.dtype == jnp.bfloat16 and run.kernels != "native":
            rest["router"] = router_parts(rest["router"])  # here, or it would be done for each layer on its own
        tables = table[first_moe : first_moe + layers]
        first_moe += layers * has_experts

        def body(
            carry: tuple[jax.Array, jax.Array],
            params: Params,
            experts: Any = experts,
            rest: Params = rest,
            tables: jax.Array = tables,
            first: int = first,
        ) -> Any:
            x, within = carry
            p = Layer(run, params, rest, within, rows)
            x, new, ids = layer(p, experts, tables, x, first + within, cache, e, position, turn, real, decode_items)
            return (x, within + 1), (new, ids)

        (x, _), (new, ids) = lax.scan(body, (x, jnp.int32(0)), rest)
        news.append(new)
        chosen += [ids] * has_experts
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *news), jnp.concatenate(chosen)


def logits(run: Run, params: Params, x: jax.Array, count: jax.Array) -> jax.Array:
    """float32 [n, V] of hidden states [n, H], the first `count` of them."""
    eps = run.model.rms_norm_eps
    if run.kernels == "native":
        norm, head = params["final_norm"][None], params["lm_head"][None]
        return native.dense(x, head, jnp.int32(0), count, norm, eps, dtype=jnp.float32)

    def project(x: jax.Array) -> jax.Array:
        h = rms_norm(x, params["final_norm"], eps, run.ordered)
        return jnp.dot(h, params["lm_head"], preferred_element_type=jnp.float32)

    return run.tiles(project, (count + run.row_tile - 1) // run.row_tile, x)
