"""The native CPU kernels: numbers, rows that do not depend on others, and machines without a compiler."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ConfigError, ModelConfig, parse_hugging_face
from moe_jax.executables import choose
from moe_jax.kernels import native
from moe_jax.model import rms_norm
from moe_jax.moe import route
from moe_jax.sampling import log_sum_exp
from tests.configs import QWEN

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.array(RNG.standard_normal(shape), dtype)


@needs_compiler
@pytest.mark.parametrize("types", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("k, n", [(64, 96), (20, 7), (33, 130)])
def test_dense(types: tuple[str, str], k: int, n: int) -> None:
    x, w = normal(40, k, dtype=types[0]), normal(2, k, n, dtype=types[1])
    norm, bias, residual = (normal(*s, dtype=types[0]) for s in ((2, k), (2, n), (40, n)))
    found = native.dense(x, w, jnp.int32(1), jnp.int32(37), norm, 1e-6, bias, residual)
    h = rms_norm(x, norm[1], 1e-6).astype(jnp.float32)
    expected = jnp.dot(h, w[1].astype(jnp.float32), precision="highest") + bias[1] + residual
    tolerance = 2e-5 if types[0] == "float32" else 0.03
    np.testing.assert_allclose(found[:37].astype("float32"), expected[:37], atol=tolerance * 30, rtol=tolerance)
    assert not found[37:].any()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype: str) -> None:
    x, w = normal(70, 48), normal(1, 48, 112, dtype=dtype)
    zero = jnp.int32(0)
    whole = np.asarray(native.dense(x, w, zero, jnp.int32(70)))
    for count in range(1, 20):
        np.testing.assert_array_equal(native.dense(x[:count], w, zero, jnp.int32(count)), whole[:count])
        np.testing.assert_array_equal(native.dense(x[50:], w, zero, jnp.int32(count))[:count], whole[50 : 50 + count])


@needs_compiler
def test_dense_by_head() -> None:
    x, w = normal(5, 3, 24), normal(2, 3, 24, 40)
    found = native.dense(x, w, jnp.int32(1), jnp.int32(5))
    np.testing.assert_allclose(found, jnp.einsum("nhi,hio->nho", x, w[1], precision="highest"), atol=2e-5)


@needs_compiler
@pytest.mark.parametrize(
    "fields",
    [
        {"normalize_weights": True},
        {"num_groups": 4, "top_groups": 2, "routed_scale": 2.5},
        {"scoring": "sigmoid", "routing_bias": True, "num_groups": 2, "top_groups": 1, "group_score": "top2"},
    ],
    ids=["softmax", "groups", "sigmoid"],
)
def test_route(fields: dict[str, Any]) -> None:
    c: ModelConfig = replace(parse_hugging_face(QWEN), **fields)
    x, norm, router = normal(9, c.hidden_size), normal(2, c.hidden_size), normal(2, c.hidden_size, c.num_experts)
    bias = normal(2, c.num_experts) if c.routing_bias else None
    h, ids, weights = native.route(x, norm, router, bias, jnp.int32(1), jnp.int32(9), c)
    expected_h = rms_norm(x, norm[1], c.rms_norm_eps)
    np.testing.assert_allclose(h, expected_h, atol=1e-5, rtol=1e-5)
    logits = jnp.dot(expected_h, router[1], precision="highest")
    expected_ids, expected = route(c, logits, None if bias is None else bias[1])
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, atol=2e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("vocab", [7, 64, 1003])
def test_log_sum_exp(vocab: int) -> None:
    x = normal(6, vocab) * 5
    x = x.at[2].set(1.5).at[3].set(jnp.nan).at[4, 3:].set(-jnp.inf)
    best, total = native.log_sum_exp(x, jnp.int32(6))
    expected_best, expected = log_sum_exp(x)
    np.testing.assert_array_equal(best, expected_best)
    rows = [0, 1, 2, 4, 5]  # 3 is not a number in both
    np.testing.assert_allclose(total[jnp.array(rows)], expected[jnp.array(rows)], atol=1e-5)
    assert best[2] == 0 and best[3] == 0


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_a_machine_without_a_compiler(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(native, "identity", native.identity.__wrapped__)
    with pytest.warns(UserWarning, match="slower without the native CPU kernels"):
        assert native._library.__wrapped__() is None
    monkeypatch.setattr(native, "available", lambda: False)
    assert choose("auto", "cpu") == "xla"
    with pytest.raises(ConfigError, match="expected a CPU and a C"):
        choose("native", "cpu")


def test_kernels_of_a_device() -> None:
    assert choose("auto", "NVIDIA H200") == "hopper"
    assert choose("auto", "NVIDIA A100", "device NVIDIA A100, expected another") == "xla"
    assert choose("reference", "cpu") == "reference"
    with pytest.raises(ConfigError, match="found native on NVIDIA H200"):
        choose("native", "NVIDIA H200")
