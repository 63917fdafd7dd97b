"""Kernels for the CPU in C++, called through XLA's foreign function interface.

They are compiled when first used, by the C++ compiler of the machine, for its processor, and kept in the user's cache
directory. Without a compiler `available` says so once and callers go on with plain XLA. Every output is computed in an
order that its shape alone decides, on any number of threads, so the kernels keep what deterministic mode promises.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-DNDEBUG")
_TARGETS = ("dense", "expert_ffn", "attend", "split_heads", "route", "log_sum_exp", "write_rows")


# Building


def _compiler() -> list[str] | None:
    """The command of the C++ compiler, $CXX or c++; None if there is none."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if command and shutil.which(command[0]) else None


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return f"{platform.machine()} {found[0]}"
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def identity() -> str:
    """Digest of all that the kernels' results may depend on: their source, the compiler, the processor, XLA's headers.

    Raises OSError or subprocess.SubprocessError when there is no working compiler.
    """
    command = _compiler()
    if command is None:
        name = os.environ.get("CXX") or "c++"
        raise FileNotFoundError(f"no C++ compiler: {name} is not there; install one, or set CXX")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.iterdir()):
        if file.suffix in (".cc", ".h"):
            digest.update(file.read_bytes())
    digest.update(repr((command, version, _FLAGS, _processor(), jaxlib.version.__version__)).encode())
    return digest.hexdigest()[:24]


def _build() -> Path:
    """The library's path; compiled by one process at a time if it is not there."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-jax" / "native"
    path = home / f"{identity()}.so"
    if path.exists():
        return path
    command = _compiler()
    assert command is not None
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=home) as directory:
                new = Path(directory) / path.name
                include = ("-isystem", jax.ffi.include_dir(), str(_SOURCES / "kernels.cc"), "-o", str(new))
                subprocess.run([*command, *_FLAGS, *include], capture_output=True, text=True, check=True, timeout=300)
                os.replace(new, path)
    return path


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, registered with XLA; None, after a warning, where they cannot be had."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        warnings.warn(f"slower without the native CPU kernels: {said[0] if said else e!r}", stacklevel=2)
        return None
    for name in _TARGETS:
        function = getattr(library, f"moe_jax_{name}")
        jax.ffi.register_ffi_target(f"moe_jax_{name}", jax.ffi.pycapsule(function), platform="cpu")
    return library


def available() -> bool:
    """Whether the kernels are here, compiled if need be; they may be called afterwards."""
    return _library() is not None


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
