"""The step on a Hopper GPU: which engines run the kernels, expert weights at load, and attention of a step's rows.

Like everything on a GPU it has no loop whose length is data (see `Run.straight`): grids and shapes are a bucket's, and
kernels read counts on the device. Imported where it is used, because Pallas takes its time to import.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.attention import Cache, Entries
from moe_jax.config import EngineConfig, ModelConfig
from moe_jax.kernels import decode
from moe_jax.kernels.grouped_gemm import scales_to_blocks, to_blocks
from moe_jax.kernels.paged_attention import LOG2E, PAGE, ROWS, Queries, choose_splits, merge, paged_attention
from moe_jax.params import SCALES
from moe_jax.small import Call

# A layer's weights are cut out of their stack by XLA's fusions around cuBLAS; for Triton's products they are copied.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
EXPERTS = ("experts_gate_up", "experts_down")
GPUS = ("H100", "H200", "H800", "H20", "GH200")  # in the name of the device


def refusal(model: ModelConfig, engine: EngineConfig, kind: str, types: list[np.dtype]) -> str | None:
    """Why the kernels cannot run this configuration on devices of this kind, if so. types: of the expert weights."""
    value_dim = model.latent.kv_rank if model.latent else model.head_dim
    key_dim = model.latent.kv_rank + model.latent.rope_dim if model.latent else model.head_dim
    sizes = dict(key_dim=key_dim, value_dim=value_dim, hidden=model.hidden_size, inner=model.moe_intermediate_size)
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__}, expected 0.11 or later"
    if not any(gpu in kind for gpu in GPUS):
        return f"device {kind}, expected one of {', '.join(GPUS)}"
    if engine.dtype != "bfloat16" or engine.deterministic:
        return f"dtype {engine.dtype}, deterministic {engine.deterministic}, expected bfloat16 and False"
    if engine.page_size != PAGE:
        return f"page_size {engine.page_size}, expected {PAGE}"
    if odd := {name: size for name, size in sizes.items() if size % 64}:
        return f"{odd}, expected multiples of 64"
    if odd := {str(t) for t in types if t not in (jnp.bfloat16, jnp.float8_e4m3fn)}:
        return f"expert weights in {', '.join(sorted(odd))}, expected bfloat16 or float8_e4m3fn"
    return None


def prepare(name: str, weights: jax.Array, call: Call) -> jax.Array:
    """Expert weights [..., K, N] or their scales, named as in `params`, as the kernels read them. Those given are
    deleted."""
    blocks = call(blocks_of, next(iter(weights.devices())), weights, name=name)
    weights.delete()
    return blocks


@partial(jax.jit, static_argnames="name")
def blocks_of(weights: jax.Array, name: str) -> jax.Array:
    to = to_blocks if name in EXPERTS else scales_to_blocks
    return to(weights, name.startswith(EXPERTS[0]))


def prepared_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `prepare` gives."""
    return jax.eval_shape(partial(blocks_of, name=name), jax.ShapeDtypeStruct(shape, jnp.bfloat16)).shape


def scales(experts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array] | None:
    """Of a segment's experts, where they are 8-bit."""
    up, down = (experts.get(f"{name}{SCALES}") for name in EXPERTS)
    return None if up is None or down is None else (up, down)


def finite(new: Cache) -> Cache:
    """What a step adds to the cache, with zeros for what is not finite: pages are multiplied whole, and what a row must
    not see is weighted with zero, so nobody's NaN may lie in a page that others will get."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), new)


def write(cache: Cache, new: Cache, position: jax.Array, page: jax.Array) -> Cache:
    """As `attention.write`. Caches are taken as arrays of lines, and updates go to the first axes: of other scatters
    XLA may turn the whole operand around, and back."""
    k, v = cache["k"], cache.get("v")
    layers, pages, kv_heads, key_dim, page_size = k.shape
    offset = position % page_size
    first = jnp.arange(layers, dtype=jnp.int32)[:, None] * pages + page
    first = jnp.where(page < 0, layers * pages, first)[:, None]  # out of bounds: dropped
    head = first * kv_heads + jnp.arange(kv_heads, dtype=jnp.int32)[:, None]  # [layers, kv_heads, rows]
    line = head[:, :, None] * key_dim + jnp.arange(key_dim, dtype=jnp.int32)[:, None]
    values = new["k"].transpose(0, 2, 3, 1)  # positions last, so that neighbours write neighbours
    lines = k.reshape(-1, page_size).at[line, jnp.broadcast_to(offset, line.shape)]
    written = {"k": lines.set(values, mode="drop", unique_indices=True).reshape(k.shape)}
    if v is not None:
        lines = v.reshape(-1, v.shape[-1]).at[head * page_size + offset]
        written["v"] = lines.set(new["v"].swapaxes(1, 2), mode="drop", unique_indices=True).reshape(v.shape)
    return written


def _padded_groups(groups: int, tokens: int) -> int:
    """Query heads of a kv head, padded so that an item's rows are a multiple of 8, from 64 on of 64."""
    fits = (g for g in range(groups, groups + ROWS) if tokens * g % (8 if tokens * g <= ROWS else ROWS) == 0)
    return next(fits)


def decode_items(position: jax.Array, e: Entries) -> Queries:
    """Decode rows, which are entries of the same numbers."""
    i = jnp.arange(min(position.shape[0], e.tables.shape[0]), dtype=jnp.int32)
    return Queries(i, jnp.where(i < e.num_decode, position[: i.size], 0), i, i)


def attend(
    q: jax.Array,
    new: Cache,
    cache: Cache,
    layer: jax.Array,
    items: Queries,
    e: Entries,
    value_dim: int,
    row_tile: int,
    prefill: bool,
    fused: bool,
) -> jax.Array:
    """As `attention.attend`, up to rounding. `new` must be finite, items are `decode_items`. fused: see `model.Run`."""
    rows, heads, key_dim = q.shape
    kv_heads = cache["k"].shape[2]
    groups = heads // kv_heads
    grouped = q.reshape(rows, kv_heads, groups, key_dim)

    def look(
        queries: jax.Array, tokens: int, items: Queries, nk: jax.Array | None, nv: jax.Array | None, splits: int
    ) -> tuple[jax.Array, jax.Array]:
        pages = cache["k"], cache.get("v"), nk, nv
        return paged_attention(queries, *pages, layer, e.tables, items, value_dim, tokens, splits)

    def see(
        queries: jax.Array, tokens: int, items: Queries, nk: jax.Array | None, nv: jax.Array | None, splits: int
    ) -> tuple[jax.Array, jax.Array]:
        """queries [items, tokens, kv_heads, groups, key_dim]. Returns rows [items * tokens, kv_heads, groups, ...]."""
        n, wide = queries.shape[0], _padded_groups(groups, tokens)
        queries = jnp.pad(queries, ((0, 0),) * 3 + ((0, wide - groups), (0, 0)))
        queries = queries.swapaxes(1, 2).reshape(n, kv_heads, tokens * wide, key_dim)
        out, lse = merge(*look(queries, tokens, items, nk, nv, splits))

        def by_row(x: jax.Array) -> jax.Array:
            x = x.reshape(n, kv_heads, tokens, wide, *x.shape[3:]).swapaxes(1, 2)
            return x.reshape(n * tokens, *x.shape[2:])[:, :, :groups]

        return by_row(out), by_row(lse)

    n = items.entry.shape[0]
    splits = choose_splits(n, kv_heads, _padded_groups(groups, 1), value_dim, e.tables.shape[1])
    if fused:
        found = look(grouped, 1, items, None, None, splits)
        return decode.merge(*found, grouped, new["k"], new["v"]).reshape(rows, heads, value_dim)
    out, lse = see(grouped[:n, None], 1, items, None, None, splits)
    if prefill:
        pages = -(-rows // PAGE)

        def paged(x: jax.Array) -> jax.Array:  # [pages, kv_heads, 64, dim]
            x = jnp.pad(x, ((0, pages * PAGE - rows), (0, 0), (0, 0)))
            return x.reshape(pages, PAGE, *x.shape[1:]).swapaxes(1, 2)

        tile = jnp.arange(rows // row_tile, dtype=jnp.int32)
        live = (tile >= (e.num_decode + row_tile - 1) // row_tile) & (tile < e.num_tiles)
        row = tile * row_tile
        items = Queries(
            e.tile_entry,
            jnp.where(live, e.start[e.tile_entry], 0),
            jnp.where(live, e.first_row[e.tile_entry], row),
            row,
        )
        nv = paged(new["v"]) if "v" in new else None
        tiled = see(
            grouped.reshape(-1, row_tile, *grouped.shape[1:]), row_tile, items, paged(new["k"]).swapaxes(2, 3), nv, 1
        )
        is_decode = jnp.arange(rows) < e.num_decode

        def choose(few: jax.Array, all_rows: jax.Array) -> jax.Array:
            few = jnp.pad(few, ((0, rows - n),) + ((0, 0),) * (few.ndim - 1))
            return jnp.where(is_decode.reshape(-1, *[1] * (few.ndim - 1)), few, all_rows)

        out, lse = choose(out, tiled[0]), choose(lse, tiled[1])
    # Last, every row sees itself.
    own_k = new["k"][:, :, None].astype(jnp.float32)
    own_v = new["v"][:, :, None] if "v" in new else own_k[..., :value_dim]
    s = (grouped.astype(jnp.float32) * own_k).sum(-1) * LOG2E
    top = jnp.maximum(lse, s)
    before, itself = jnp.exp2(lse - top)[..., None], jnp.exp2(s - top)[..., None]
    y = (out * before + own_v.astype(jnp.float32) * itself) / (before + itself)
    return lax.reshape(y.astype(q.dtype), (rows, heads, value_dim))
