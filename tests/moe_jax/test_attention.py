"""Every version of paged attention passes the same tests against plain softmax attention in numpy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import attention
from moe_jax.attention import Entries
from moe_jax.kernels import native

TILE, PAGES_EACH, ENTRIES, ROWS, LAYERS = 16, 5, 16, 80, 2


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page_size: int
    latent: bool = False


SHAPES = {
    "grouped": Shape(4, 2, 16, 16, 16),
    "odd sizes": Shape(3, 1, 20, 12, 24),
    "latent": Shape(4, 1, 40, 32, 16, latent=True),
}


def xla(*args: Any) -> jax.Array:
    return attention.attend(*args[:-1], tile=TILE, row_tile=args[-1], prefill=True)


VERSIONS: dict[str, Callable[..., jax.Array]] = {"xla": xla}
if native.available():
    VERSIONS["native"] = native.attend
RUN = {name: jax.jit(f, static_argnums=(6, 7)) for name, f in VERSIONS.items()}


class Sequences:
    """Random sequences, whole: what any step should see of them."""

    def __init__(self, s: Shape, count: int = 4) -> None:
        rng = np.random.default_rng(1)
        length = PAGES_EACH * s.page_size
        self.shape = s
        self.q = rng.standard_normal((count, length, s.heads, s.key_dim)).astype(np.float32)
        self.k = rng.standard_normal((count, length, s.kv_heads, s.key_dim)).astype(np.float32)
        self.v = rng.standard_normal((count, length, s.kv_heads, s.value_dim)).astype(np.float32)
        if s.latent:
            self.v = self.k[..., : s.value_dim]
        self.pages = rng.permutation(count * PAGES_EACH + 3)[: count * PAGES_EACH].reshape(count, PAGES_EACH)

    def expected(self, i: int, position: int) -> np.ndarray:
        """[heads, value_dim]"""
        groups = self.shape.heads // self.shape.kv_heads
        k, v = (np.repeat(a[i, : position + 1], groups, axis=1) for a in (self.k, self.v))
        s = np.einsum("hd,jhd->hj", self.q[i, position].astype(np.float64), k)
        p = np.exp(s - s.max(-1, keepdims=True))
        return np.einsum("hj,jhd->hd", p / p.sum(-1, keepdims=True), v)

    def cache(self, filled: dict[int, int]) -> dict[str, jax.Array]:
        """With so many positions of each sequence; all else is NaN."""
        s, size = self.shape, self.shape.page_size
        pages = self.pages.size + 3
        k = np.full((LAYERS, pages, s.kv_heads, s.key_dim, size), np.nan, np.float32)
        v = np.full((LAYERS, pages, s.kv_heads, size, s.value_dim), np.nan, np.float32)
        for i, count in filled.items():
            for j in range(count):
                page = self.pages[i, j // size]
                k[1, page, :, :, j % size], v[1, page, :, j % size] = self.k[i, j], self.v[i, j]
        return {"k": jnp.array(k)} if s.latent else {"k": jnp.array(k), "v": jnp.array(v)}

    def step(self, run: Any, decode: list[tuple[int, int]], prefill: list[tuple[int, int, int]]) -> dict:
        """Attention of a step: decode (sequence, position), prefill (sequence, start, count). By (sequence, position):
        [heads, value_dim]."""
        s = self.shape
        tables, start = np.zeros((ENTRIES, PAGES_EACH), np.int32), np.zeros(ENTRIES, np.int32)
        first_row, tile_entry = np.zeros(ENTRIES, np.int32), np.zeros(ROWS // TILE, np.int32)
        rows: dict[tuple[int, int], int] = {}
        next_row = -(-len(decode) // TILE) * TILE
        for e, (i, begin, count) in enumerate([(i, p, 1) for i, p in decode] + prefill):
            row = e if e < len(decode) else next_row
            tables[e], start[e], first_row[e] = self.pages[i], begin, row
            rows |= {(i, begin + n): row + n for n in range(count)}
            if e >= len(decode):
                next_row += -(-count // TILE) * TILE
                tile_entry[row // TILE : next_row // TILE] = e
        position = np.zeros(ROWS, np.int32)
        q, k, v = (np.zeros((ROWS, *a.shape[2:]), np.float32) for a in (self.q, self.k, self.v))
        for (i, p), row in rows.items():
            position[row], q[row], k[row], v[row] = p, self.q[i, p], self.k[i, p], self.v[i, p]
        e = Entries(*map(jnp.array, (tables, start, first_row, tile_entry, len(decode), next_row // TILE)))
        new = {"k": jnp.array(k)} if s.latent else {"k": jnp.array(k), "v": jnp.array(v)}
        filled = {i: p for i, p, *_ in decode + prefill}
        out = np.asarray(
            run(jnp.array(q), new, self.cache(filled), jnp.int32(1), jnp.array(position), e, s.value_dim, TILE)
        )
        assert np.isfinite(out[:next_row]).all(), "padding, too"
        return {key: out[row] for key, row in rows.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=15)
@given(data=st.data())
def test_any_step(version: str, shape: str, data: st.DataObject) -> None:
    sequences = Sequences(SHAPES[shape])
    last = PAGES_EACH * SHAPES[shape].page_size - 1
    decode = [(i, data.draw(st.integers(0, last))) for i in range(data.draw(st.integers(0, 2)))]
    prefill = []
    for i in (2, 3):
        start = data.draw(st.integers(0, last))
        prefill.append((i, start, data.draw(st.integers(1, min(24, last + 1 - start)))))
    for (i, position), found in sequences.step(RUN[version], decode, prefill).items():
        np.testing.assert_allclose(found, sequences.expected(i, position), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_prefilled_or_decoded(version: str, shape: str) -> None:
    """A row's bits are the same in a decode step and in a prefill of any cut, in any company."""
    sequences = Sequences(SHAPES[shape])
    step = partial(sequences.step, RUN[version])
    expected = {(0, p): step([(0, p)], [])[0, p] for p in (0, 15, 16, 23, 24, 37, 47)}
    for decode, prefill in (
        ([], [(0, 0, 48)]),
        ([(1, 30)], [(0, 12, 36)]),
        ([(1, 5), (2, 70)], [(0, 16, 8), (3, 0, 20)]),
        ([(0, 24), (1, 3), (2, 40)], []),
        ([(3, 1)], [(2, 7, 9), (0, 37, 11)]),
    ):
        for key, found in step(decode, prefill).items():
            if key in expected:
                np.testing.assert_array_equal(found, expected[key], err_msg=f"{key} in {decode} {prefill}")


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_write(dtype: str, shape: str) -> None:
    """New rows get to the same places, and those that are padding nowhere."""
    s, rng = SHAPES[shape], np.random.default_rng(2)
    cache = {name: a.astype(dtype) for name, a in Sequences(s).cache({0: 30, 2: 11}).items()}
    new = {
        name: jnp.array(rng.standard_normal((LAYERS, 9, s.kv_heads, dim)), dtype)
        for name, dim in (("k", s.key_dim), ("v", s.value_dim))
        if name in cache
    }
    position = jnp.array([0, 5, 17, 18, 19, 40, 41, 0, 0], jnp.int32)
    page = jnp.array([3, 3, 7, 7, 8, 0, 1, -1, -1], jnp.int32)
    expected = attention.write(cache, new, position, page)
    found = jax.jit(native.write, donate_argnums=0)({n: jnp.array(a) for n, a in cache.items()}, new, position, page)
    for name in cache:
        np.testing.assert_array_equal(found[name].astype("float32"), expected[name].astype("float32"))
