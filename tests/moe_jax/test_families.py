"""Every family, in several configurations, against `transformers` in float32 on the CPU."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import reference

from moe_jax.checkpoint import load_params, open_checkpoint

pytest.importorskip("torch")
pytest.importorskip("transformers")
import oracle

from tests.engines import make_engine

TOLERANCE = 2e-4  # in log-probability
IDS = np.random.default_rng(7).integers(0, oracle.VOCAB, 64).tolist()

FIRST = list({family: (family, variant) for family, variant in reversed(oracle.CASES)}.values())


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, variant = request.param
    return oracle.make(family, tmp_path_factory.mktemp(f"{family}-{variant}"), variant)


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """Config and parameters with expert e in slot e."""
    checkpoint = open_checkpoint(path)
    c = checkpoint.config
    slots = np.tile(np.arange(c.num_experts, dtype=np.int32), (c.num_moe_layers, 1))
    return c, load_params(checkpoint, slots, jax.local_devices()[0], "float32")


def score(model: Path, **options: Any) -> np.ndarray:
    """What `LLM.score` returns, without compiling the programs that it does not use."""
    engine = make_engine(model, warm_up=False, max_prefill_rows=16, max_model_len=128, num_pages=16, **options)
    job = engine.add_score(0, IDS)
    while job.sequence.remaining:
        engine.step()
    found = np.concatenate(job.rows)
    assert found.dtype == np.float32
    return found


def assert_same(a: Any, b: Any) -> None:
    for (path, x), (_, y) in zip(*(jax.tree.leaves_with_path(t) for t in (a, b)), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), path


@pytest.mark.parametrize("model", oracle.CASES, indirect=True, ids=lambda c: "-".join(c))
class TestLogProbs:
    def test_plain_forward_pass(self, model: Path) -> None:
        """The config, the description of the parameters and the loading are right, whatever the engine does."""
        found = reference.logprobs(*load(model), IDS)
        np.testing.assert_allclose(found, oracle.logprobs(model, IDS), rtol=0, atol=TOLERANCE)

    def test_score(self, model: Path) -> None:
        np.testing.assert_allclose(score(model), oracle.logprobs(model, IDS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model", FIRST, indirect=True, ids=lambda c: "-".join(c))
def test_score_on_four_ranks(model: Path) -> None:
    """With one copy of each expert, and with more slots than that."""
    expected = oracle.logprobs(model, IDS)
    whole = score(model)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=TOLERANCE)
    for spare in (0, 1):
        slots = open_checkpoint(model).config.num_experts // 4 + spare
        np.testing.assert_array_equal(score(model, ranks=4, slots=slots), whole)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["xla", "reference"])
@pytest.mark.parametrize("model", FIRST, indirect=True, ids=lambda c: "-".join(c))
def test_score_without_native_kernels(model: Path, kernels: str) -> None:
    np.testing.assert_allclose(score(model, kernels=kernels), oracle.logprobs(model, IDS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", oracle.VARIANTS)
def test_fused_and_sharded_files_load_as_the_same_parameters(family: str, tmp_path: Path) -> None:
    plain = oracle.make(family, tmp_path / "plain")
    fused = oracle.make(family, tmp_path / "fused")
    oracle.fuse_experts(fused)
    sharded = oracle.make(family, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    _, expected = load(plain)
    assert_same(load(fused)[1], expected)
    assert_same(load(sharded)[1], expected)


def test_the_routing_bias_of_the_oracle_is_random(tmp_path: Path) -> None:
    _, params = load(oracle.make("deepseek_v3", tmp_path))
    bias = np.asarray(params["segments"][1]["router_bias"])
    assert bias.dtype == np.float32 and len(np.unique(bias)) == bias.size


def test_bfloat16_files(tmp_path: Path) -> None:
    path = oracle.make("qwen3_moe", tmp_path, dtype="bfloat16")
    config, params = load(path)
    layer = params["segments"][0]
    assert (layer["experts_down"].dtype, layer["o"].dtype, layer["router"].dtype) == ("bfloat16", "float32", "float32")
    found = reference.logprobs(config, params, IDS)
    np.testing.assert_allclose(found, oracle.logprobs(path, IDS), rtol=0, atol=TOLERANCE)
