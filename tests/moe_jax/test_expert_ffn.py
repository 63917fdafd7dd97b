"""Every version of the experts' feed-forward passes the same tests against the plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.kernels import native
from moe_jax.kernels.expert_ffn import expert_ffn, expert_ffn_reference, prepare

M, C, S, H, INNER = 24, 3, 6, 64, 64
VERSIONS = {"tiled": jax.jit(expert_ffn, static_argnames="tile")}
if native.available():
    VERSIONS["native"] = jax.jit(native.expert_ffn, static_argnames="tile")


def weights(dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (2, S, H, 2 * INNER)).astype(dtype) * 0.1,
        jax.random.normal(keys[1], (2, S, INNER, H)).astype(dtype) * 0.1,
    )


routings = st.one_of(
    st.lists(st.integers(-1, S - 1), min_size=M * C, max_size=M * C),  # any
    st.integers(-1, S - 1).map(lambda s: [s] * (M * C)),  # all rows in one expert, or none at all
    st.integers(0, M * C - 1).map(lambda i: [-1] * i + [2] + [-1] * (M * C - 1 - i)),  # a single row
)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60)
@given(slots=routings, seed=st.integers(0, 9), layer=st.integers(0, 1))
def test_any_routing(version: str, slots: list[int], seed: int, layer: int) -> None:
    x = jax.random.normal(jax.random.key(seed), (M, H))
    slot = jnp.array(slots, jnp.int32).reshape(M, C)
    found = VERSIONS[version](x, slot, *weights(), jnp.int32(layer), tile=8)
    expected = expert_ffn_reference(x, slot, *weights(), jnp.int32(layer))
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
    assert not np.asarray(found)[np.array(slots).reshape(M, C) < 0].any()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_does_not_depend_on_the_others(version: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((M, H)).astype(np.float32)
    slot = rng.integers(0, S, (M, C)).astype(np.int32)
    together = np.asarray(VERSIONS[version](x, slot, *weights(), jnp.int32(0), tile=8))
    for row in range(M):
        alone = np.full_like(slot, -1)
        alone[row] = slot[row]
        other = np.roll(x, 5, axis=0)
        other[row] = x[row]
        found = np.asarray(VERSIONS[version](other, alone, *weights(), jnp.int32(0), tile=8))
        np.testing.assert_array_equal(found[row], together[row])


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_bits_are_exact(version: str) -> None:
    """A CPU keeps bfloat16 weights as their bits; widened they are the same numbers."""
    x = jax.random.normal(jax.random.key(3), (M, H))
    slot = jax.random.randint(jax.random.key(4), (M, C), -1, S)
    wide = [w.astype(jnp.float32) for w in weights("bfloat16")]
    bits = [prepare(w) for w in weights("bfloat16")]
    assert all(b.dtype == jnp.uint16 for b in bits)
    run = VERSIONS[version]
    np.testing.assert_array_equal(run(x, slot, *bits, jnp.int32(1), tile=8), run(x, slot, *wide, jnp.int32(1), tile=8))
