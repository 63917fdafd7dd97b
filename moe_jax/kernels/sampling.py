"""Sampling on a GPU without a branch that the host waits at (Pallas, Triton).

XLA's host thread needs the predicate of every branch of a program, so the device idles from there on until the host has
enqueued the rest, and the next step. While it waits, XLA cannot abort a lost peer's communicator. What is costly and
seldom asked for (top-k, top-p, the best tokens) is therefore one kernel each, a block a row, that looks at its row's
parameters itself and ends at once where nothing is asked.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_jax.kernels.decode import call
from moe_jax.request import MAX_LOGPROBS
from moe_jax.sampling import Sampled, SampleParams, is_restricted, logprob_of, ordered_bits, tempered, with_noise

_CHUNK = 8192  # of the vocabulary, at once
_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def sample(logits: jax.Array, p: SampleParams, want_top: jax.Array, interpret: bool = False) -> Sampled:
    """`sampling.sample`, up to rounding."""
    total = jax.nn.logsumexp(logits, axis=-1)
    kept = ordered_bits(logits) >= edges(logits, p, interpret)[:, None]
    drawn = with_noise(logits, jnp.where(kept, tempered(logits, p), -jnp.inf), p)
    token = jnp.argmax(drawn, axis=-1).astype(jnp.int32)
    ids, values = best(logits, want_top, interpret)
    values = jnp.where(want_top, values - total[:, None], 0)
    return Sampled(token, logprob_of(logits, token, total), ids, values)


def _sweep(x_ref: Any, row: jax.Array, times: Any, f: Callable[..., Any], start: Any) -> Any:
    """f(carry, values, their indices, which of them are new) over a row's chunks, `times` (0 or 1) times.

    The last chunk is one that fits, so that nothing behind the row is read; what it has again is not new.
    """
    vocab = x_ref.shape[1]
    size = 1 << (min(vocab, _CHUNK).bit_length() - 1)

    def chunk(i: jax.Array, carry: Any) -> Any:
        first = jnp.minimum(i * size, vocab - size)
        index = first + jnp.arange(size, dtype=jnp.int32)
        return f(carry, x_ref[row, pl.ds(first, size)], index, index >= i * size)

    return lax.fori_loop(0, times * -(-vocab // size), chunk, start)


def edges(logits: jax.Array, p: SampleParams, interpret: bool = False) -> jax.Array:
    """The least of each row's `ordered_bits` [S] that top-k, then top-p leave; the least of all where they do not
    decide. logits [S, V] float32."""
    rows, vocab = logits.shape

    def body(x_ref: Any, k_ref: Any, p_ref: Any, t_ref: Any, asked_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0)
        top_k, top_p, temperature = k_ref[row], p_ref[row], t_ref[row]
        by_k = (asked_ref[row] > 0) & (top_k > 0) & (top_k < vocab)
        by_p = (asked_ref[row] > 0) & (top_p < 1)

        def total(weight: Callable[..., jax.Array], least: jax.Array, times: Any) -> jax.Array:
            """The sum of the weights of what is at least `least`."""

            def add(sum_: jax.Array, x: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
                return sum_ + jnp.where(new & (ordered_bits(x) >= least), weight(x), 0).sum()

            return _sweep(x_ref, row, times, add, jnp.float32(0))

        def edge(weight: Callable[..., jax.Array], enough: jax.Array, least: jax.Array, asked: jax.Array) -> jax.Array:
            """The greatest bound, from `least` on, with that much above it; by bisection."""

            def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                low, high = bounds
                middle = (low & high) + ((low ^ high) >> 1)
                ok = total(weight, middle, 1) >= enough
                return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

            return lax.fori_loop(jnp.int32(0), 32 * asked.astype(jnp.int32), halve, (least, jnp.int32(_MOST)))[0]

        low = edge(jnp.ones_like, top_k.astype(jnp.float32), jnp.int32(_LEAST), by_k)
        times = by_p.astype(jnp.int32)
        top = _sweep(
            x_ref, row, times, lambda most, x, index, new: jnp.maximum(most, x.max()), jnp.float32(-jnp.inf)
        )  # a chunk that is seen twice has no other maximum

        def mass(x: jax.Array) -> jax.Array:
            return jnp.exp((x - top) / temperature)

        # A sum that rounding leaves short of 1 must not cut off anything.
        enough = jnp.minimum(top_p, 1 - 1e-6) * total(mass, low, times)
        out_ref[row] = edge(mass, enough, low, by_p)

    run = call(body, jax.ShapeDtypeStruct((rows,), jnp.int32), (rows,), 8, interpret)
    return run(logits, p.top_k, p.top_p, p.temperature, is_restricted(p).astype(jnp.int32))


def best(logits: jax.Array, wanted: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k(logits, MAX_LOGPROBS)`: the tokens and their logits, [S, MAX_LOGPROBS]; zeros unless `wanted`."""
    rows, vocab = logits.shape

    def body(x_ref: Any, wanted_ref: Any, ids_ref: Any, values_ref: Any) -> None:
        row = pl.program_id(0)
        times = wanted_ref[0]

        def clear(j: Any, carry: Any) -> Any:
            ids_ref[row, j], values_ref[row, j] = jnp.int32(0), jnp.float32(0)
            return carry

        def next_best(j: Any, last: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            last_value, last_id = last

            def look(found: Any, x: jax.Array, index: jax.Array, new: jax.Array) -> Any:
                value, token = found
                left = new & ((x < last_value) | ((x == last_value) & (index > last_id)))
                most = jnp.where(left, x, -jnp.inf).max()
                at = jnp.where(left & (x == most), index, vocab).min()
                better = (most > value) | ((most == value) & (at < token))
                return jnp.where(better, most, value), jnp.where(better, at, token)

            value, token = _sweep(x_ref, row, 1, look, (jnp.float32(-jnp.inf), jnp.int32(vocab)))
            ids_ref[row, j], values_ref[row, j] = token, value
            return value, token

        lax.fori_loop(0, MAX_LOGPROBS * (1 - times), clear, times)
        lax.fori_loop(0, MAX_LOGPROBS * times, next_best, (jnp.float32(jnp.inf), jnp.int32(-1)))

    shapes = [jax.ShapeDtypeStruct((rows, MAX_LOGPROBS), t) for t in (jnp.int32, jnp.float32)]
    return call(body, shapes, (rows,), 8, interpret)(logits, wanted.astype(jnp.int32).reshape(1))
