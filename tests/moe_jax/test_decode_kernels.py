"""The small kernels of a decode step against what they stand for, interpreted on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import hopper, model, moe
from moe_jax.attention import write
from moe_jax.config import parse_hugging_face
from moe_jax.kernels import decode, paged_attention, routing, sampling
from moe_jax.request import MAX_LOGPROBS
from moe_jax.sampling import SampleParams, ordered_bits, restrict, sample, tempered
from tests.gpus import lower

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas of jax 0.10 lacks some of it")
BF16 = jnp.bfloat16
CONFIG = parse_hugging_face(
    dict(model_type="qwen3_moe", vocab_size=64, hidden_size=256, num_hidden_layers=3, num_attention_heads=16)
    | dict(num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True)
    | dict(moe_intermediate_size=64, intermediate_size=64)
)
LAYER, ROWS = jnp.int32(1), 5


def random(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_near(found: jax.Array, expected: jax.Array, relative: float = 0.0) -> None:
    """relative: of the greatest; a step of bfloat16 is 2^-8."""
    a, b = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=relative * np.abs(b).max())


def test_where_they_fit() -> None:
    assert decode.fits(CONFIG)
    raw: dict[str, Any] = dict(model_type="deepseek_v3", vocab_size=64, hidden_size=256, num_hidden_layers=1)
    raw |= dict(num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)
    raw |= dict(n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=64, intermediate_size=64)
    assert not decode.fits(parse_hugging_face(raw | dict(first_k_dense_replace=0)))


def test_norm() -> None:
    x, weights = random(0, ROWS, 256), random(1, 3, 256)
    expected = model.rms_norm(x, weights[1], 1e-6, ordered=False)
    assert_near(decode.norm(x, weights, LAYER, 1e-6, interpret=True), expected)


def test_split_heads() -> None:
    qkv = random(0, ROWS, 20 * 64).at[2, -3].set(jnp.nan).at[3, 16 * 64].set(jnp.inf)
    q_norm, k_norm = random(1, 3, 64), random(2, 3, 64)
    turn = model.rotary(jnp.arange(ROWS) * 7, CONFIG.rope)
    q, k, v = (a.reshape(ROWS, -1, 64) for a in jnp.split(qkv, [16 * 64, 18 * 64], axis=-1))
    q, k = model.rms_norm(q, q_norm[1], 1e-6, False), model.rms_norm(k, k_norm[1], 1e-6, False)
    q, k = (model.rotate(a, turn, CONFIG.rope) for a in (q, k))
    new = hopper.finite({"k": k, "v": v})
    found = decode.split_heads(qkv, q_norm, k_norm, turn, LAYER, CONFIG, interpret=True)
    for a, b in zip(found, (q * CONFIG.attention_scale, new["k"], new["v"]), strict=True):
        assert_near(a, b, 2.0**-8)


def test_merge() -> None:
    out, lse = random(0, ROWS, 4, 2, 8, 64), random(1, ROWS, 4, 2, 64, dtype=np.float32)
    out, lse = out.at[:, 2].set(0), lse.at[:, 2].set(-jnp.inf)  # a part that sees nothing
    out, lse = out.at[0].set(0), lse.at[0].set(-jnp.inf)  # a row that sees only itself
    q, k, v = random(2, ROWS, 2, 8, 64), random(3, ROWS, 2, 64), random(4, ROWS, 2, 64)
    f32 = jnp.float32
    own = (q.astype(f32) * k[:, :, None].astype(f32)).sum(-1) * decode.LOG2E
    parts = jnp.concatenate([out.astype(f32), jnp.broadcast_to(v[:, None, :, None], (ROWS, 1, 2, 8, 64))], axis=1)
    expected, _ = paged_attention.merge(parts, jnp.concatenate([lse[..., :8], own[:, None]], axis=1))
    assert_near(decode.merge(out, lse, q, k, v, interpret=True), expected, 2.0**-8)


def test_route() -> None:
    parts = random(0, ROWS, 96, dtype=np.float32)
    table = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(32), (3, 1)), axis=1)[..., None], jnp.int32)
    real = jnp.array([1, 1, 0, 1, 0], jnp.int32)
    high, middle, low = jnp.split(parts, 3, axis=1)
    ids, expected = moe.route(CONFIG, low + middle + high, None)
    slots, weights, found = decode.route(parts, table, LAYER, real, CONFIG, interpret=True)
    np.testing.assert_array_equal(found, jnp.where(real[:, None] > 0, ids, -1))
    np.testing.assert_array_equal(slots, moe.choose_slots(jnp.where(real[:, None] > 0, ids, -1), table[1], False))
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("pairs, groups, block_m", [(64, 16, 8), (256, 32, 32)])
@pytest.mark.parametrize("kind", ["random", "one", "none"])
def test_assign(pairs: int, groups: int, block_m: int, kind: str) -> None:
    slot = np.random.default_rng(0).integers(-1, groups, (pairs // 4, 4)).astype(np.int32)
    if kind != "random":
        slot[:] = 3 if kind == "one" else -1
    place, tiles = decode.assign(jnp.array(slot), groups, block_m, interpret=True)
    expected, sizes = routing.assign_rows(jnp.array(slot), groups)
    cut = routing.cut_tiles(sizes, pairs, block_m)
    np.testing.assert_array_equal(place, expected)
    assert tiles.count == cut.count and tiles.group.shape == cut.group.shape
    for name in ("group", "row", "size"):
        found = getattr(tiles, name)[: int(cut.count)]
        np.testing.assert_array_equal(found, getattr(cut, name)[: int(cut.count)], name)


@pytest.mark.parametrize("latent", [False, True])
def test_write(latent: bool) -> None:
    cache = {"k": random(0, 2, 4, 2, 8, 16)} | ({} if latent else {"v": random(1, 2, 4, 2, 16, 8)})
    new = {name: random(2, 2, 6, 2, 8) for name in cache}
    position, page = jnp.array([3, 19, 0, 15, 16, 40]), jnp.array([0, 3, -1, 2, 1, -1])
    expected = write(cache, new, position, page)
    for name, found in hopper.write(cache, new, position, page).items():
        np.testing.assert_array_equal(found, expected[name])


@pytest.mark.parametrize("how", ["straight", "kernels"])
@pytest.mark.parametrize(
    "temperature, top_p, top_k, want",
    [(0.0, 1.0, 0, False), (0.7, 1.0, 0, True), (0.7, 0.5, 0, False), (1.3, 1.0, 7, True), (1.0, 0.9, 40, False)],
)
def test_sampling_on_a_gpu(how: str, temperature: float, top_p: float, top_k: int, want: bool) -> None:
    n = 8
    live = jnp.arange(n) < 6  # the rest is padding, all zeros
    seed = jnp.tile(jnp.array([[5, 6]], jnp.uint32), (n, 1))
    k = jnp.where(live, top_k * (jnp.arange(n) != 1), 0)  # one that is not restricted by it
    p = SampleParams(jnp.where(live, temperature, 0), jnp.where(live, top_p, 0), k, seed, jnp.arange(n))
    logits = random(0, n, 700, dtype=np.float32) * 3
    logits = logits.at[3, 10:300].set(-jnp.inf).at[4, 20:40].set(9.0)
    run = partial(sample, straight=True) if how == "straight" else partial(sampling.sample, interpret=True)
    found, expected = run(logits, p, jnp.array(want)), sample(logits, p, jnp.array(want))
    np.testing.assert_array_equal(found.token, expected.token)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    np.testing.assert_array_equal(found.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, atol=1e-5)


def test_what_top_k_and_top_p_leave() -> None:
    """Over several chunks of the vocabulary, the last of which overlaps the one before."""
    n, vocab = 12, 5 * 8192 + 1000
    draw = np.random.default_rng(0)
    k = jnp.asarray([0, 1, 2, 50, 10_000, vocab, vocab + 5, 0, 0, 0, 3, 1000], jnp.int32)
    top_p = jnp.asarray([1, 1, 1, 1, 1, 1, 1, 0.1, 0.9, 0.999, 0.5, 0.2], jnp.float32)
    temperature = jnp.asarray(draw.uniform(0.3, 2.0, n), jnp.float32)
    logits = random(1, n, vocab, dtype=np.float32) * 2
    p = SampleParams(temperature, top_p, k, jnp.zeros((n, 2), jnp.uint32), jnp.arange(n))
    kept = ordered_bits(logits) >= sampling.edges(logits, p, interpret=True)[:, None]
    expected = np.asarray(restrict(tempered(logits, p), k, top_p)) > -np.inf
    apart = (np.asarray(kept) != expected).sum(1)
    assert (apart <= 2).all(), apart  # sums are rounded differently: a token at the edge of the nucleus
    assert (apart[:7] == 0).all(), apart
    values, ids = jax.lax.top_k(logits, MAX_LOGPROBS)
    found_ids, found = sampling.best(logits, jnp.array(True), interpret=True)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_array_equal(found, values)


def test_sampling_lowers_for_a_gpu() -> None:
    n, vocab = 4, 151936
    spec = jax.ShapeDtypeStruct
    f32, i32 = spec((n,), jnp.float32), spec((n,), jnp.int32)
    p: Any = SampleParams(f32, f32, i32, spec((n, 2), jnp.uint32), i32)  # pyright: ignore[reportArgumentType]
    text = lower(sampling.sample, spec((n, vocab), jnp.float32), p, spec((), jnp.bool_))
    assert "stablehlo.case" not in text and "stablehlo.if" not in text and "stablehlo.while" not in text
