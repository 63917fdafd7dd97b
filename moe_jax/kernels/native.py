"""Kernels for the CPU in C++, called through XLA's foreign function interface.

Compiled for the machine's processor, see `cpp`; without a compiler callers go on with plain XLA. Every output is
computed in an order that its shape alone decides, on any number of threads, so the kernels keep what deterministic mode
promises.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.cpp import Library

_TARGETS = ("dense", "expert_ffn", "attend", "split_heads", "route", "log_sum_exp", "write_rows")
_SOURCES = Path(__file__).parent / "native"
_LIBRARY = Library(
    (_SOURCES / "kernels.cc", *sorted(_SOURCES.glob("*.h"))),
    ("-O3", "-march=native", "-pthread"),
    tuple((name, name, "cpu") for name in _TARGETS),
    without="slower without the native CPU kernels",
)


def identity() -> str:
    """As Library.identity."""
    return _LIBRARY.identity()


def available() -> bool:
    """Whether the kernels are here, compiled if need be; they may be called afterwards."""
    return _LIBRARY.load() is not None


# Operations


def _call(name: str, shape: tuple[int, ...], dtype: Any, *args: Any, **attributes: Any) -> jax.Array:
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.ffi.ffi_call(f"moe_jax_{name}", result)(*args, **attributes)  # type: ignore[return-value]


def dense(
    x: jax.Array,
    w: jax.Array,
    layer: jax.Array,
    rows: jax.Array,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """rms_norm(x) @ w[layer] + bias[layer] + residual for the first `rows` rows, zeros for the others: [T, N].

    x [T, K]; w [L, K, N]; norm [L, K]; bias [L, N]; residual [T, N]; layer, rows [] int32. Without norm, x as it is.
    Products are summed in float32, and the result is rounded once, to `dtype` or else x's. Batched, with none of norm,
    bias and residual: x [T, B, K], w [L, B, K, N], result [T, B, N].
    """
    optional = (jnp.zeros(0, x.dtype) if a is None else a for a in (norm, bias, residual))
    batch = x.shape[1:-1]
    args = (x.reshape(x.shape[0], -1, x.shape[-1]), w.reshape(w.shape[0], -1, *w.shape[-2:]), *optional, layer, rows)
    y = _call("dense", (x.shape[0], *args[1].shape[1::2]), dtype or x.dtype, *args, eps=np.float32(eps))
    return y.reshape(x.shape[0], *batch, w.shape[-1])


def expert_ffn(
    x: jax.Array, slot: jax.Array, gate_up: jax.Array, down: jax.Array, layer: jax.Array, tile: int = 0
) -> jax.Array:
    """As kernels.expert_ffn.expert_ffn; each hit slot's weights are read once for up to 32 of its rows."""
    del tile
    return _call("expert_ffn", (*slot.shape, x.shape[1]), x.dtype, x, slot, gate_up, down, layer)


def attend(
    q: jax.Array,
    new: dict[str, jax.Array],
    cache: dict[str, jax.Array],
    layer: jax.Array,
    position: jax.Array,
    e: Any,
    value_dim: int,
    row_tile: int,
) -> jax.Array:
    """As attention.attend."""
    none = jnp.zeros(0, q.dtype)
    return _call(
        "attend",
        (*q.shape[:2], value_dim),
        q.dtype,
        *(q, new["k"], new.get("v", none), cache["k"], cache.get("v", none), layer, position),
        *(e.tables, e.start, e.first_row, e.tile_entry, e.num_decode, e.num_tiles),
        row_tile=np.int64(row_tile),
    )


def split_heads(
    x: jax.Array, norms: tuple[jax.Array, jax.Array] | None, turn: Any, layer: jax.Array, rows: jax.Array, c: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [T, heads, D], scaled, keys and values [T, kv_heads, D] of x [T, (heads + 2 kv_heads) D], normalised and
    rotated as the ModelConfig says. norms: stacked weights of queries' and keys' norms; turn: `model.rotary`."""
    n, none = x.shape[0], jnp.zeros(0, x.dtype)
    heads = [jax.ShapeDtypeStruct((n, h, c.head_dim), x.dtype) for h in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    cos, sin = (a.reshape(n, -1) for a in turn)
    return jax.ffi.ffi_call("moe_jax_split_heads", heads)(  # type: ignore[return-value]
        *(x, *(norms or (none, none)), cos, sin, layer, rows),
        norm=np.int64({"none": 0, "head": 1, "full": 2}[c.qk_norm]),
        eps=np.float32(c.rms_norm_eps),
        clip=np.float32(c.clip_qkv or 0),
        scale=np.float32(c.attention_scale),
        interleaved=np.bool_(c.rope.interleaved),
    )


def route(
    x: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    bias: jax.Array | None,
    layer: jax.Array,
    rows: jax.Array,
    c: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h = rms_norm(x) [T, H], and its experts and their weights [T, top_k] as `moe.route`. All weights are stacked."""
    n = x.shape[0]
    types = [jax.ShapeDtypeStruct(s, t) for s, t in ((x.shape, x.dtype), ((n, c.top_k), jnp.int32))]
    types.append(jax.ShapeDtypeStruct((n, c.top_k), jnp.float32))
    return jax.ffi.ffi_call("moe_jax_route", types)(  # type: ignore[return-value]
        *(x, norm, router, jnp.zeros(0) if bias is None else bias, layer, rows),
        eps=np.float32(c.rms_norm_eps),
        groups=np.int64(c.num_groups),
        top_groups=np.int64(c.top_groups),
        sigmoid=np.bool_(c.scoring == "sigmoid"),
        best_two=np.bool_(c.group_score != "max"),
        normalize=np.bool_(c.normalize_weights),
        scale=np.float32(c.routed_scale),
    )


def log_sum_exp(x: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest index of each row's greatest number, int32 [T], and log(sum(exp(row))) [T], of x [T, N] float32."""
    types = [jax.ShapeDtypeStruct(x.shape[:1], t) for t in (jnp.int32, jnp.float32)]
    return jax.ffi.ffi_call("moe_jax_log_sum_exp", types)(x, rows)  # type: ignore[return-value]


def write(
    cache: dict[str, jax.Array], new: dict[str, jax.Array], position: jax.Array, page: jax.Array
) -> dict[str, jax.Array]:
    """As attention.write, in place where the cache is donated."""

    def one(name: str) -> jax.Array:
        result = jax.ShapeDtypeStruct(cache[name].shape, cache[name].dtype)
        call = jax.ffi.ffi_call("moe_jax_write_rows", result, input_output_aliases={0: 0})
        return call(cache[name], new[name], position, page, turned=np.bool_(name == "k"))  # type: ignore[return-value]

    return {name: one(name) for name in cache}
