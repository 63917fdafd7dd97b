"""From logits to tokens, on the device.

A sampled token is a function of the logits and of (seed, position): noise for each token id is hashed from (seed,
position, id), so it does not matter which rank samples, in which batch, or after which failure.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.reduce import ordered_max, ordered_sum
from moe_jax.request import MAX_LOGPROBS

_WIDTH = 64  # rows are reduced as [V / 64, 64], which is vectorised
_BLOCK = 32 * _WIDTH  # and padded so that `ordered_sum` finds divisors


class SampleParams(NamedTuple):
    """One entry for each sampled row, [S]."""

    temperature: jax.Array  # float32, 0 for greedy
    top_p: jax.Array  # float32
    top_k: jax.Array  # int32, 0 for off
    seed: jax.Array  # uint32 [S, 2], low word first
    position: jax.Array  # int32, of the token to be produced


class Sampled(NamedTuple):
    token: jax.Array  # [S] int32
    logprob: jax.Array  # [S] float32, of the unmodified distribution
    top_tokens: jax.Array  # [S, MAX_LOGPROBS] int32
    top_logprobs: jax.Array  # [S, MAX_LOGPROBS] float32


def _mix(x: jax.Array) -> jax.Array:
    """A full-avalanche 32-bit mixer ("lowbias32", C. Wellons, Prospecting for Hash Functions)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def gumbel(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """Standard Gumbel noise [S, vocab], a function of (seed, position, token id) alone."""
    key = _mix(_mix(_mix(seed[:, 0]) ^ seed[:, 1]) + position.astype(jnp.uint32))
    bits = _mix(_mix(key[:, None] ^ _mix(jnp.arange(vocab, dtype=jnp.uint32))) + key[:, None])
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # exact, so in (0, 1) and never either
    return -jnp.log(-jnp.log(uniform))


def _folded(x: jax.Array, fill: float) -> jax.Array:
    rows, vocab = x.shape
    return jnp.pad(x, ((0, 0), (0, -vocab % _BLOCK)), constant_values=fill).reshape(rows, -1, _WIDTH)


def row_max(x: jax.Array) -> jax.Array:
    return ordered_max(ordered_max(_folded(x, -jnp.inf), 1), 1)


def row_sum(x: jax.Array) -> jax.Array:
    return ordered_sum(ordered_sum(_folded(x, 0), 1), 1)


def row_argmax(x: jax.Array) -> jax.Array:
    """The lowest index of the greatest value; 0 if there is none (NaN)."""
    vocab = x.shape[1]
    index = jnp.where(x >= row_max(x)[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab)
    best = -ordered_max(ordered_max(_folded(-index, -vocab), 1), 1)
    return jnp.where(best < vocab, best, 0)


def log_softmax(logits: jax.Array) -> jax.Array:
    shifted = logits - row_max(logits)[:, None]
    return shifted - jnp.log(row_sum(jnp.exp(shifted)))[:, None]


def ordered_bits(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _threshold(x: jax.Array, enough: jax.Array, weight: jax.Array) -> jax.Array:
    """The greatest t with sum(weight where x >= t) >= enough, by bisection over the bits of float32. All [S, ...]."""

    value = ordered_bits(x)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough above low, not enough above high
        middle = (low & high) + ((low ^ high) >> 1)
        ok = row_sum(jnp.where(value >= middle[:, None], weight, 0)) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.full(x.shape[0], jnp.iinfo(jnp.int32).min)
    low, _ = lax.fori_loop(0, 32, halve, (low, jnp.full(x.shape[0], jnp.iinfo(jnp.int32).max)))
    return value >= low[:, None]


def restrict(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits with what top-k, then top-p leave out at -inf. Ties at the edge are kept."""
    k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[1]), logits.shape[1]).astype(jnp.float32)
    logits = jnp.where(_threshold(logits, k, jnp.ones_like(logits)), logits, -jnp.inf)
    p = jnp.exp(log_softmax(logits))
    # A sum that rounding leaves short of 1 must not cut anything off when top_p is 1.
    nucleus = _threshold(logits, jnp.minimum(top_p, 1 - 1e-6) * row_sum(p), p)
    return jnp.where(nucleus | (top_p >= 1)[:, None], logits, -jnp.inf)


def log_sum_exp(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`row_argmax`, and log(sum(exp(row))) [S]."""
    top = row_max(logits)
    return row_argmax(logits), top + jnp.log(row_sum(jnp.exp(logits - top[:, None])))


def sample(
    logits: jax.Array,
    p: SampleParams,
    want_top: jax.Array,
    reduce: Callable[..., Any] = log_sum_exp,
    straight: bool = False,
) -> Sampled:
    """logits [S, V] float32; want_top: whether any row asked for its best tokens (zeros if not: they are costly).
    reduce: a version of `log_sum_exp`. straight: without branches, with the same results (see `model.Run`)."""
    choose = _choose if straight else lax.cond
    random, restricted = (p.temperature > 0).any(), is_restricted(p).any()

    def draw() -> jax.Array:
        scaled = tempered(logits, p)
        scaled = choose(restricted, lambda: restrict(scaled, p.top_k, p.top_p), lambda: scaled)
        return row_argmax(with_noise(logits, scaled, p))

    greedy, total = reduce(logits)
    token = choose(random, draw, lambda: greedy)
    top = choose(want_top, lambda: _best(logits, total), lambda: _no_best(logits))
    return Sampled(token, logprob_of(logits, token, total), *top)


def _choose(predicate: jax.Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), yes(), no())


def is_restricted(p: SampleParams) -> jax.Array:
    """Whether top-k or top-p decide about a row. Not about greedy ones, nor about padding, which is all zeros."""
    return ((p.top_k > 0) | (p.top_p < 1)) & (p.temperature > 0)


def tempered(logits: jax.Array, p: SampleParams) -> jax.Array:
    return logits / jnp.where(p.temperature > 0, p.temperature, 1)[:, None]


def with_noise(logits: jax.Array, scaled: jax.Array, p: SampleParams) -> jax.Array:
    """What the sampled token is the greatest of; greedy rows have no noise."""
    noisy = scaled + gumbel(p.seed, p.position, logits.shape[1])
    return jnp.where((p.temperature > 0)[:, None], noisy, logits)


def logprob_of(logits: jax.Array, token: jax.Array, total: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - total


def _best(logits: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, ids = lax.top_k(logits, MAX_LOGPROBS)
    return ids.astype(jnp.int32), values - total[:, None]


def _no_best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    none = jnp.zeros((logits.shape[0], MAX_LOGPROBS))
    return none.astype(jnp.int32), none
