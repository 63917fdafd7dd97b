"""The Hopper kernels against their plain versions: interpreted on a CPU, and lowered for a GPU without one."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.checkpoint import load_params, open_checkpoint
from moe_jax.config import ConfigError
from moe_jax.executables import Executables, Program, resolve
from moe_jax.hopper import EXPERTS
from moe_jax.kernels import tuning
from moe_jax.kernels.grouped_gemm import (
    Config,
    dequantise,
    from_blocks,
    grouped_gemm,
    grouped_gemm_reference,
    quantise,
    scales_to_blocks,
    to_blocks,
)
from moe_jax.kernels.hopper_ffn import hopper_ffn, hopper_ffn_reference
from moe_jax.kernels.paged_attention import Queries, merge, paged_attention, paged_attention_reference
from moe_jax.kernels.routing import (
    assign_rows,
    combine,
    combine_reference,
    cut_tiles,
    padded_rows,
    permute,
    permute_reference,
)
from moe_jax.llm import engine_config, model_directory
from moe_jax.mesh import ExpertMesh
from moe_jax.programs import ProgramStore
from moe_jax.sampling import sample
from tests import configs
from tests.engines import SMALL
from tests.gpus import lower

new_jax = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas of jax 0.10 lacks some of it")
BF16 = jnp.bfloat16


def random(seed: int, *shape: int, scale: float = 1.0, dtype: Any = BF16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def interpret(kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The kernel's result as the interpreter has it, NaN where nothing was written. It also looks for data races, and
    knows of those in the last kernel that ran."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # seen in jax 0.11.2; nothing public tells

    params = getattr(plgpu, "InterpretGPUParams")(detect_races=True)  # noqa: B009  jax 0.10 has it elsewhere
    found = jax.block_until_ready(kernel(*args, **options, interpret=params))
    assert not gpu_callbacks.get_races().races_found
    return found


def error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-6))


# Few shapes, each of which is compiled: (groups, pairs).
slots = st.sampled_from([(1, 3), (5, 40), (9, 600)]).flatmap(
    lambda shape: st.tuples(
        st.just(shape[0]),
        st.one_of(
            st.lists(st.integers(-1, shape[0] - 1), min_size=shape[1], max_size=shape[1]),
            st.integers(-1, shape[0] - 1).map(lambda slot: [slot] * shape[1]),
        ),
    )
)
assign = jax.jit(assign_rows, static_argnums=1)
cut = jax.jit(cut_tiles, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None)
@given(routed=slots, block_m=st.sampled_from([8, 64]))
def test_rows_and_tiles(routed: tuple[int, list[int]], block_m: int) -> None:
    """Each pair has a row of its own in a tile of its group; tiles and rows stay within what was promised."""
    groups, flat = routed
    place, sizes = assign(np.array(flat, np.int32)[:, None], groups)
    tiles = cut(sizes, len(flat), block_m)
    assert sizes.tolist() == [flat.count(g) for g in range(groups)]
    count = int(tiles.count)
    assert count <= len(tiles.group)
    group_of_row = {}
    columns = [np.asarray(x)[:count].tolist() for x in (tiles.group, tiles.row, tiles.size)]
    for group, row, size in zip(*columns, strict=True):
        assert row % 8 == 0 and 1 <= size <= block_m
        for r in range(row, row + size):
            assert r not in group_of_row
            group_of_row[r] = group
    rows = np.asarray(place)[:, 0].tolist()
    assert [group_of_row.get(r, -1) for r in rows] == flat
    assert len({r for r in rows if r >= 0}) == len(group_of_row) == sum(s >= 0 for s in flat)
    assert all(r < padded_rows(len(flat), groups) for r in rows)


def tiles_of(sizes: list[int], block_m: int) -> tuple[np.ndarray, Any, int]:
    """Rows of some group, the tiles, and how many rows there are, for groups of these sizes."""
    slot = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    place, counted = assign_rows(jnp.array(slot)[:, None], len(sizes))
    return np.asarray(place)[:, 0], cut_tiles(counted, len(slot), block_m), padded_rows(len(slot), len(sizes))


@new_jax
@settings(max_examples=2, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 8, 9, 40, 70]), min_size=2, max_size=3).filter(any), seed=st.integers(0, 9)
)
@pytest.mark.parametrize(
    "config, activate",
    [
        (Config(32, (8, 32), 2, 1, 2), True),
        (Config(64, (16, 64), 1, 2, 3, buffers=2), False),
        (Config(32, (16, 32), 1, 1, 2, cluster=2), False),
        (Config(32, (8, 24, 32), 2, 1, 3, in_turn=True), True),
        (Config(32, (16, 32), 2, 1, 2, cluster=2, in_turn=True), False),
    ],
    ids=["swiglu", "down", "cluster", "in turn", "cluster in turn"],
)
def test_grouped_gemm(config: Config, activate: bool, sizes: list[int], seed: int) -> None:
    blocks = to_blocks(random(seed, 2, len(sizes), 128, 256, scale=0.1), activate)
    rows, tiles, m = tiles_of(sizes, config.block_m)
    x = random(seed + 1, m, 128)
    args = (x, blocks, tiles, jnp.int32(1), config, activate)
    found = interpret(grouped_gemm, *args, sms=2)
    assert error(found[rows], grouped_gemm_reference(*args)[rows]) < 4e-3


@new_jax
def test_grouped_gemm_of_8_bit_weights() -> None:
    config = Config(16, (8, 16), 2, 2, 2)
    weights, scale = quantise(random(0, 1, 2, 256, 256, scale=0.1, dtype=np.float32))
    scale = scale * 10.0 ** np.random.default_rng(2).integers(-3, 4, scale.shape)  # sums are kept in units of these
    scale = scale.at[0, 0, 0, 0].set(0)
    blocks, scales = to_blocks(weights, True), scales_to_blocks(scale, True)
    rows, tiles, m = tiles_of([3, 20], config.block_m)
    args = (random(1, m, 256), blocks, tiles, jnp.int32(0), config, True, scales)
    assert error(interpret(grouped_gemm, *args, sms=2)[rows], grouped_gemm_reference(*args)[rows]) < 4e-3


@pytest.mark.parametrize("activate", [True, False])
def test_blocks_and_back(activate: bool) -> None:
    weights = random(0, 2, 3, 128, 384)
    np.testing.assert_array_equal(from_blocks(to_blocks(weights, activate), activate), weights)
    small, scale = quantise(jnp.asarray(random(1, 3, 256, 512, dtype=np.float32)))
    wide = small.astype(np.float32) * np.repeat(np.repeat(scale, 128, -1), 128, -2)
    found = from_blocks(dequantise(to_blocks(small, activate), scales_to_blocks(scale, activate)), activate)
    np.testing.assert_array_equal(found, wide)
    assert error(wide, random(1, 3, 256, 512, dtype=np.float32)) < 0.03


@new_jax
def test_permute_and_combine() -> None:
    slot = np.random.default_rng(0).integers(-1, 4, (6, 3)).astype(np.int32)
    place, _ = assign_rows(jnp.array(slot), 4)
    rows, used = padded_rows(slot.size, 4), np.asarray(place)[np.asarray(place) >= 0]
    x, weights = random(0, 6, 256), random(1, 6, 3, dtype=np.float32)
    found = interpret(permute, x, place, rows)
    np.testing.assert_array_equal(found[used], permute_reference(x, place, rows)[used])
    y = jnp.full((rows, 256), jnp.nan, BF16).at[used].set(random(2, len(used), 256))
    found = interpret(combine, y, place, weights)
    assert error(found, combine_reference(y, place, weights)) < 4e-3
    found = interpret(combine, y, place, weights, x)
    assert error(found, x + combine_reference(y, place, weights)) < 6e-3


@new_jax
@pytest.mark.parametrize("bits", [16, 8])
def test_the_whole_path(bits: int) -> None:
    up, back = random(0, 1, 3, 128, 256, scale=0.1, dtype=np.float32), random(1, 1, 3, 128, 128, dtype=np.float32)
    scales = None
    if bits == 8:
        (up, up_scale), (back, scale) = quantise(up), quantise(back)
        scales = scales_to_blocks(up_scale, True), scales_to_blocks(scale, False)
    else:
        up, back = up.astype(BF16), back.astype(BF16)
    gate_up, down = to_blocks(up, True), to_blocks(back, False)
    slot = jnp.array([[0, 2], [2, -1], [-1, -1], [2, 0]], jnp.int32)
    args = (random(2, 4, 128), slot, random(3, 4, 2, dtype=np.float32), gate_up, down, jnp.int32(0), 1.0, scales)
    assert error(interpret(hopper_ffn, *args, sms=2), hopper_ffn_reference(*args)) < 5e-3


SHAPES = {  # kv heads, query rows, tokens, key dim, value dim, whether values are in the keys
    "grouped": (2, 8, 1, 64, 64, False),
    "grouped, prefill": (1, 128, 16, 64, 64, False),
    "latent": (1, 128, 1, 576, 512, True),
    "latent, few heads": (1, 16, 1, 576, 512, True),
    "latent, prefill": (1, 128, 16, 576, 512, True),
}


@new_jax
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_attention(shape: str) -> None:
    kv_heads, rows, tokens, key_dim, value_dim, latent = SHAPES[shape]
    n, pages, splits = 2, 6, 2 if tokens == 1 else 1
    rng = np.random.default_rng(0)
    keys = random(0, 2, pages, kv_heads, key_dim, 64, scale=0.3)
    values = None if latent else random(1, 2, pages, kv_heads, 64, value_dim)
    new = tokens > 1
    new_keys = random(2, 2, kv_heads, key_dim, 64, scale=0.3) if new else None
    new_values = random(3, 2, kv_heads, 64, value_dim) if new and not latent else None
    q = random(4, n, kv_heads, rows, key_dim)
    tables = jnp.array(rng.integers(0, pages, (n, 12 if not latent else 5)), jnp.int32)
    # One sequence is as long as a table, so that every page's place in shared memory is used again; one sees nothing.
    seen = np.array([64 * tables.shape[1] - 3, 0], np.int32)
    items = Queries(*(jnp.array(x, jnp.int32) for x in ([0, 1], seen, [5, 5], [5, 5 + tokens])))
    args = (q, keys, values, new_keys, new_values, jnp.int32(1), tables, items, value_dim, tokens)
    found, lse = merge(*interpret(paged_attention, *args, splits))
    expected, expected_lse = paged_attention_reference(*args)
    assert error(found, expected) < 4e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def shape(*sizes: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


@new_jax
@pytest.mark.parametrize("tokens", [64, 8192])
@pytest.mark.parametrize(
    "groups, hidden, inner", [(128, 2048, 768), (32, 7168, 2048), (8, 4096, 14336), (64, 2048, 1408)]
)
def test_the_whole_path_lowers_for_a_gpu(groups: int, hidden: int, inner: int, tokens: int) -> None:
    text = lower(
        hopper_ffn,
        shape(tokens, hidden),
        shape(tokens, 8, dtype=np.int32),
        shape(tokens, 8, dtype=np.float32),
        jax.eval_shape(partial(to_blocks, swiglu=True), shape(1, groups, hidden, 2 * inner)),
        jax.eval_shape(partial(to_blocks, swiglu=False), shape(1, groups, inner, hidden)),
        shape(dtype=np.int32),
    )
    assert text.count("custom_call @mosaic_gpu") == 4
    assert "stablehlo.while" not in text  # a loop whose end is data would have the host wait for it


@new_jax
@pytest.mark.parametrize("prefill", [False, True])
def test_the_step_of_a_wide_model(prefill: bool, tmp_path: Path) -> None:
    """One whose decode steps take the small kernels between the products. They are lowered on a GPU alone."""
    raw = {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 3, "head_dim": 64}
    raw |= {"num_attention_heads": 16, "num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"moe_intermediate_size": 64, "intermediate_size": 64}))
    checkpoint = open_checkpoint(tmp_path, "dummy")
    config = engine_config(checkpoint.config, 1, "gpu", kernels="hopper", **SMALL)
    programs = Executables.of(checkpoint, config, "NVIDIA H200", ProgramStore(None))
    mesh, bucket = ExpertMesh((jax.devices()[0],)), next(b for b in config.buckets if b.prefill == prefill)
    assert programs.run(bucket, 1).fused != prefill
    traced = programs.step(bucket, mesh).trace(*programs.arguments(Program("step", bucket, 1), mesh))
    _, tokens, new, chosen, logits = traced.out_info
    assert tokens.shape == (1, config.max_batch) and logits is None
    assert chosen.shape == (3, bucket.rows, 4) and chosen.dtype == jnp.int32
    assert {n: a.shape[:2] for n, a in new.items()} == {"k": (3, bucket.rows), "v": (3, bucket.rows)}


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels ask the mesh what its devices are, and here they are a CPU's."""
    monkeypatch.setattr("moe_jax.kernels.hopper_ffn.can_assign", lambda pairs, groups: False)
    monkeypatch.setattr("moe_jax.kernels.sampling.sample", partial(sample, straight=True))


FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@new_jax
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_8_bit_experts_stay_so(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the engine's parameters, in its programs, and in what memory is planned for; elsewhere they are widened."""
    without_triton(monkeypatch)
    raw = configs.QWEN | {"model_type": family, "head_dim": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    raw |= {"hidden_size": 256, "moe_intermediate_size": 128, "quantization_config": FLOAT8, "dtype": "bfloat16"}
    raw |= {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
    raw |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(tmp_path, "dummy")
    config = engine_config(checkpoint.config, 1, "gpu", kernels="hopper", **SMALL)
    programs = Executables.of(checkpoint, config, "NVIDIA H200", ProgramStore(None))
    mesh, model = ExpertMesh((jax.devices()[0],)), programs.model
    assert model.float8_experts
    shapes = programs.arguments(Program("step", config.buckets[0], 1), mesh)[0]
    last = len(model.segments) - 1
    slots = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    params = load_params(checkpoint, slots, mesh.devices[0], "bfloat16", prepare=programs.prepare)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    plain = load_params(checkpoint, slots, mesh.devices[0], "bfloat16")["segments"][last]
    for name in EXPERTS:
        found = params["segments"][last]
        wide = from_blocks(dequantise(found[name], found[f"{name}_scales"]), name == EXPERTS[0])
        each = jnp.repeat(jnp.repeat(plain[f"{name}_scales"], 128, -1), 128, -2)
        np.testing.assert_array_equal(wide, plain[name].astype(np.float32) * each)
    step = programs.step(config.buckets[0], mesh).trace(
        *programs.arguments(Program("step", config.buckets[0], 1), mesh)
    )
    assert "f8E4M3FN" in step.lower(lowering_platforms=("cuda",)).as_text()
    elsewhere = Executables.of(checkpoint, replace(config, kernels="xla"), "NVIDIA H200", ProgramStore(None))
    assert not elsewhere.model.float8_experts
    assert elsewhere.types["segments"][last]["experts_down"] == jnp.bfloat16
    assert resolve(checkpoint, replace(config, kernels="auto"), "NVIDIA H200")[0] is checkpoint


@new_jax
@pytest.mark.parametrize("prefill", [False, True])
def test_the_step_lowers_for_a_gpu(prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    checkpoint = open_checkpoint(model_directory("demo"))
    config = engine_config(checkpoint.config, 1, "gpu", kernels="hopper", **SMALL)
    programs = Executables.of(checkpoint, config, "NVIDIA H200", ProgramStore(None))
    mesh, bucket = ExpertMesh((jax.devices()[0],)), next(b for b in config.buckets if b.prefill == prefill)
    lowered = programs.step(bucket, mesh).trace(*programs.arguments(Program("step", bucket, 1), mesh))
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    # For each of the model's two segments: two GEMMs and decode attention, and prefill's.
    kernels = text.count("custom_call @mosaic_gpu")
    assert kernels == (4 if prefill else 3) * len(checkpoint.config.segments), kernels


@pytest.mark.parametrize(
    "kind, options, found",
    [
        ("NVIDIA H200", {"kernels": "reference"}, "reference"),
        ("NVIDIA H200", {"deterministic": True}, "xla"),
        ("NVIDIA H200", {"page_size": 32}, "xla"),
        ("NVIDIA A100", {}, "xla"),
    ],
)
def test_where_they_do_not_run(kind: str, options: dict[str, Any], found: str) -> None:
    checkpoint = open_checkpoint(model_directory("demo"))
    config = engine_config(checkpoint.config, 1, "gpu", **(SMALL | options))
    assert Executables.of(checkpoint, config, kind, ProgramStore(None)).engine.kernels == found
    if found == "xla":
        with pytest.raises(ConfigError, match="found hopper with .* expected"):
            Executables.of(checkpoint, replace(config, kernels="hopper"), kind, ProgramStore(None))


@new_jax
@pytest.mark.parametrize("shape_", SHAPES)
def test_paged_attention_lowers_for_a_gpu(shape_: str) -> None:
    kv_heads, rows, tokens, _, _, latent = SHAPES[shape_]
    key_dim, value_dim = (576, 512) if latent else (128, 128)
    one: Any = shape(32, dtype=np.int32)
    text = lower(
        partial(paged_attention, value_dim=value_dim, tokens=tokens, splits=2),
        shape(32, kv_heads, rows, key_dim),
        shape(2, 99, kv_heads, key_dim, 64),
        None if latent else shape(2, 99, kv_heads, 64, value_dim),
        shape(8, kv_heads, key_dim, 64) if tokens > 1 else None,
        shape(8, kv_heads, 64, value_dim) if tokens > 1 and not latent else None,
        shape(dtype=np.int32),
        shape(32, 64, dtype=np.int32),
        Queries(one, one, one, one),
    )
    assert "custom_call @mosaic_gpu" in text


@given(
    groups=st.integers(1, 512),
    k=st.integers(1, 200).map(lambda n: 64 * n),
    n=st.integers(1, 200).map(lambda n: 64 * n),
    rows=st.integers(1, 5000),
    activate=st.booleans(),
    weight_bytes=st.integers(1, 2),
)
def test_any_shape_has_a_configuration(
    groups: int, k: int, n: int, rows: int, activate: bool, weight_bytes: int
) -> None:
    if weight_bytes == 1:
        k, n = 2 * k, 2 * n  # blocks of 128 by 128 have a scale
    shape = tuning.Shape(groups, k, 2 * n if activate else n, rows, activate, weight_bytes)
    assert tuning.fits(tuning.best(shape), shape)
    assert all(tuning.fits(c, shape) for c in tuning.candidates(shape))


def test_the_table_holds_what_can_run() -> None:
    for shape, config in tuning._table():
        assert tuning.fits(config, shape)
        assert tuning.best(shape) == config


@pytest.mark.parametrize("k, n, activate", [(96, 128, False), (64, 96, False), (64, 192, True)])
def test_other_sizes_are_refused(k: int, n: int, activate: bool) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        to_blocks(random(0, 1, k, n), activate)
