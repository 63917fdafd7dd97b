"""Sampling on the device against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.sampling import SampleParams, gumbel, log_softmax, restrict, row_argmax, sample

V = 100
jitted_restrict = jax.jit(restrict)


def params(
    n: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, position: int = 0
) -> SampleParams:
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return SampleParams(
        jnp.full(n, temperature),
        jnp.full(n, top_p),
        jnp.full(n, top_k, jnp.int32),
        jnp.tile(jnp.array([[low, high]], jnp.uint32), (n, 1)),
        jnp.arange(position, position + n, dtype=jnp.int32),
    )


def plain_restrict(x: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Token ids that top-k, then top-p leave in, ties at the edge kept."""
    edge = np.sort(x)[::-1][min(top_k, V) - 1] if top_k else -np.inf
    kept = x >= edge
    p = np.where(kept, np.exp(x.astype(np.float64) - x.max()), 0)
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        needed = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        kept &= p >= p[order[min(needed, V) - 1]]
    return set(np.flatnonzero(kept).tolist())


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(0, V + 5), top_p=st.sampled_from([0.05, 0.3, 0.9, 0.99, 1.0]))
def test_restrict(seed: int, top_k: int, top_p: float) -> None:
    x = np.random.default_rng(seed).normal(0, 3, (1, V)).astype(np.float32)
    found = jitted_restrict(jnp.array(x), jnp.array([top_k]), jnp.array([top_p], jnp.float32))
    assert set(np.flatnonzero(np.isfinite(found[0])).tolist()) == plain_restrict(x[0], top_k, top_p)


def test_greedy_takes_the_first_of_equals() -> None:
    x = np.zeros((4, V), np.float32)
    x[1, 7] = x[1, 90] = 2
    x[2, 99] = 1e-3
    assert row_argmax(jnp.array(x)).tolist() == [0, 7, 99, 0]
    assert sample(jnp.array(x), params(4), jnp.array(False)).token.tolist() == [0, 7, 99, 0]


def test_logprobs_and_best_tokens() -> None:
    x = np.random.default_rng(1).normal(0, 4, (3, V)).astype(np.float32)
    expected = x - np.log(np.exp(x.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(log_softmax(jnp.array(x)), expected, atol=2e-6, rtol=2e-6)
    s = sample(jnp.array(x), params(3, temperature=2.0, top_k=5), jnp.array(True))
    np.testing.assert_allclose(
        s.logprob, np.take_along_axis(expected, np.asarray(s.token)[:, None], 1)[:, 0], atol=2e-6
    )
    np.testing.assert_array_equal(s.top_tokens, np.argsort(-x, axis=1)[:, : s.top_tokens.shape[1]])


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (1.5, 4)])
def test_frequencies(temperature: float, top_k: int) -> None:
    """Chi-square of 40,000 draws at different positions against the distribution asked for."""
    n, vocab = 40_000, 12
    x = np.random.default_rng(2).normal(0, 1.5, vocab).astype(np.float32)
    draw = jax.jit(lambda p: sample(jnp.tile(jnp.array(x), (n, 1)), p, jnp.array(False)).token)
    tokens = np.asarray(draw(params(n, temperature=temperature, top_k=top_k, seed=123456789012345)))
    p = np.exp(x / temperature)
    if top_k:
        p[np.argsort(-x)[top_k:]] = 0
    p /= p.sum()
    counts = np.bincount(tokens, minlength=vocab)
    assert not counts[p == 0].any()
    chi2 = ((counts - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum()
    assert chi2 < 3 * (p > 0).sum() + 12


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    a = gumbel(jnp.array([[1, 2], [1, 2], [1, 3]], jnp.uint32), jnp.array([5, 6, 5]), 64)
    b = gumbel(jnp.array([[1, 2]], jnp.uint32), jnp.array([5]), 32)
    np.testing.assert_array_equal(a[0, :32], b[0])
    assert not np.array_equal(a[0], a[1]) and not np.array_equal(a[0], a[2])
    assert np.isfinite(a).all()


def test_noise_is_finite_at_the_end_of_its_range() -> None:
    """Places where 24 bits of hash and a half round up to one, and the noise of a token would be infinite."""
    for seed, position, token in [(0, 9367, 1565), (0, 15361, 3719), (7, 192, 144599)]:
        noise = gumbel(jnp.array([[seed, 0]], jnp.uint32), jnp.array([position]), token + 1)
        assert np.isfinite(noise).all()
