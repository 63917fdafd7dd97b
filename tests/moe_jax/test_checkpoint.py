"""Checkpoints in every form: the same parameters from each, only the bytes that are needed, and errors that say why."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint import (
    CheckpointError,
    ExpertReader,
    convert,
    load_params,
    open_checkpoint,
    param_types,
    widened,
)
from moe_jax.config import parse_hugging_face
from moe_jax.hugging_face import dequantize
from moe_jax.params import iterate, stacked_shapes
from tests import configs

BFLOAT16 = ml_dtypes.bfloat16
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}
Tensors = dict[str, np.ndarray]

QWEN = configs.QWEN | {"head_dim": 8, "mlp_only_layers": [1]}
ROUTER = "model.layers.0.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"


def save_file(tensors: Tensors, file: Path) -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            f.write(np.ascontiguousarray(array).tobytes())


def random_tensors(raw: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """All tensors of the model, one an expert."""
    rng = np.random.default_rng(seed)
    config, tensors = parse_hugging_face(raw), {}
    for _, param, first, layers in iterate(config):
        for layer in range(first, first + max(layers, 1)):
            for expert in range(config.num_experts) if param.expert else [None]:
                source = param.sources[0]
                for name, shape in zip(source.names, source.shapes, strict=True):
                    tensor = rng.standard_normal(shape, np.float32).astype(dtype)
                    tensors[name.format(layer=layer, expert=expert)] = tensor
    return tensors


def write(path: Path, tensors: Tensors | None = None, raw: dict[str, Any] = QWEN) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file(random_tensors(raw) if tensors is None else tensors, path / "model.safetensors")
    return path


def split(path: Path) -> Path:
    """A copy in two shards with an index."""
    tensors = random_tensors(QWEN)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN))
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def device() -> Any:
    return jax.local_devices()[0]


def all_experts(path: Path, *, dtype: Any = "float32", keep: bool = True, **how: Any) -> dict[str, Any]:
    checkpoint = open_checkpoint(path, **how)
    c = checkpoint.config
    slots = np.tile(np.arange(c.num_experts, dtype=np.int32), (c.num_moe_layers, 1))
    return load_params(checkpoint, slots, device(), dtype, keep)


def assert_same(a: Any, b: Any) -> None:
    for (path, x), (_, y) in zip(*(jax.tree.leaves_with_path(t) for t in (a, b)), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), path


class TestLoading:
    def test_shapes_are_those_described_and_arrays_are_committed(self, tmp_path: Path) -> None:
        params = all_experts(write(tmp_path))
        shapes = stacked_shapes(parse_hugging_face(QWEN), 8)
        described = jax.tree.leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
        for (at, array), (expected_at, (_, shape)) in zip(jax.tree.leaves_with_path(params), described, strict=True):
            assert (at, array.shape) == (expected_at, shape)
            assert array.committed and array.devices() == {device()}

    def test_slots_hold_the_experts_asked_for(self, tmp_path: Path) -> None:
        tensors = random_tensors(QWEN)
        checkpoint = open_checkpoint(write(tmp_path, tensors))
        slots = np.array([[3, -1], [0, 7], [5, 5]], np.int32)  # MoE layers are 0, 2 and 3
        params = load_params(checkpoint, slots, device(), "float32")
        down = [np.asarray(params["segments"][i]["experts_down"]) for i in (0, 2)]

        def expected(layer: int, expert: int) -> np.ndarray:
            return tensors[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"].T

        np.testing.assert_array_equal(down[0], [[expected(0, 3), np.zeros_like(expected(0, 3))]])
        np.testing.assert_array_equal(down[1][0], [expected(2, 0), expected(2, 7)])
        np.testing.assert_array_equal(down[1][1], [expected(3, 5), expected(3, 5)])

    @pytest.mark.parametrize("form", ["hugging_face", "serving", "dummy"])
    def test_a_single_expert_is_what_load_params_gives(self, form: str, tmp_path: Path) -> None:
        path = write(tmp_path / "a", random_tensors(QWEN, BFLOAT16))
        if form == "serving":
            convert(path, tmp_path / "b")
            path = tmp_path / "b"
        how: dict[str, Any] = {"load_format": "dummy"} if form == "dummy" else {}
        checkpoint = open_checkpoint(path, **how)
        params = all_experts(path, **how)
        reader = ExpertReader(checkpoint, "float32")
        for segment, layer, expert in ((2, 1, 6), (0, 0, 2)):
            for name, array in reader.read(layer, expert).items():
                assert array.dtype == params["segments"][segment][name].dtype
                np.testing.assert_array_equal(array, params["segments"][segment][name][0, expert])

    @pytest.mark.parametrize("stored", ["float32", "bfloat16"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("keep", [True, False])
    def test_dtypes(self, stored: str, dtype: str, keep: bool, tmp_path: Path) -> None:
        path = write(tmp_path, random_tensors(QWEN, np.dtype(stored)))
        layer = all_experts(path, dtype=dtype, keep=keep)["segments"][0]
        expected = "bfloat16" if keep and stored == "bfloat16" else dtype
        assert (layer["experts_down"].dtype, layer["o"].dtype, layer["router"].dtype) == (expected, dtype, "float32")

    def test_shards(self, tmp_path: Path) -> None:
        assert_same(all_experts(split(tmp_path / "a")), all_experts(write(tmp_path / "b")))

    def test_fp8_blocks(self, tmp_path: Path) -> None:
        """144 x 160 is one whole block and three parts of blocks."""
        raw = {**QWEN, "hidden_size": 144, "moe_intermediate_size": 160, "head_dim": 36}
        tensors = random_tensors(raw)
        rng, expected = np.random.default_rng(1), dict(tensors)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            weight = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            scale = rng.uniform(0.5, 2, (-(-rows // 128), -(-columns // 128))).astype(np.float32)
            tensors |= {name: weight, f"{name}_scale_inv": scale}
            expected[name] = np.empty((rows, columns), BFLOAT16)
            for i, j in np.ndindex(*scale.shape):
                block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
                expected[name][block] = weight[block].astype(np.float32) * scale[i, j]
            np.testing.assert_array_equal(dequantize(weight, scale), expected[name])
        params = all_experts(write(tmp_path / "a", tensors, raw))
        assert params["segments"][0]["experts_down"].dtype == BFLOAT16
        assert_same(params, all_experts(write(tmp_path / "b", expected, raw)))

    def test_what_is_not_used_is_warned_of_once(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        silent = {
            "model.layers.4.eh_proj.weight": np.zeros(3, np.float32),  # multi-token prediction
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        }
        path = write(tmp_path, random_tensors(QWEN) | silent)
        all_experts(path)
        assert not recwarn.list
        write(tmp_path, random_tensors(QWEN) | silent | {"model.extra": np.zeros(3, np.int32)})
        with pytest.warns(UserWarning, match=r"does not use: model\.extra$") as warned:
            all_experts(path)
        assert len(warned) == 1


FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WIDE = QWEN | {"hidden_size": 128, "moe_intermediate_size": 256, "head_dim": 32}


def float8_tensors() -> tuple[Tensors, Tensors]:
    """Of WIDE with 8-bit experts, and what they stand for in bfloat16."""
    narrow, rng = random_tensors(WIDE, BFLOAT16), np.random.default_rng(1)
    wide = dict(narrow)
    for name in [name for name in narrow if "experts" in name]:
        weight = narrow[name].astype(ml_dtypes.float8_e4m3fn)
        scale = rng.uniform(0.5, 2, tuple(n // 128 for n in weight.shape)).astype(np.float32)
        narrow |= {name: weight, f"{name}_scale_inv": scale}
        wide[name] = dequantize(weight, scale)
    return narrow, wide


class TestFloat8:
    """Checkpoints that say that their weights are 8-bit, as DeepSeek-V3's do."""

    @pytest.mark.parametrize("form", ["hugging_face", "serving"])
    def test_experts_stay_8_bit_until_they_are_widened(self, form: str, tmp_path: Path) -> None:
        narrow, wide = float8_tensors()
        path = write(tmp_path / "a", narrow, WIDE | {"quantization_config": FLOAT8})
        if form == "serving":
            convert(path, tmp_path / "b")
            path = tmp_path / "b"
        checkpoint = open_checkpoint(path)
        expected = all_experts(write(tmp_path / "c", wide, WIDE))
        slots = np.tile(np.arange(8, dtype=np.int32), (3, 1))
        assert_same(load_params(widened(checkpoint), slots, device(), "float32"), expected)
        found = load_params(checkpoint, slots, device(), "bfloat16")
        types = param_types(checkpoint, "bfloat16")
        assert jax.tree.map(lambda a: a.dtype, found) == types
        assert types["segments"][0]["experts_down"] == ml_dtypes.float8_e4m3fn
        for i in (0, 2):
            segment = found["segments"][i]
            for name in ("experts_gate_up", "experts_down"):
                weights, scales = np.asarray(segment[name])[0, 5], np.asarray(segment[f"{name}_scales"])[0, 5]
                np.testing.assert_array_equal(dequantize(weights, scales), expected["segments"][i][name][0, 5])
        for name, array in ExpertReader(checkpoint, "bfloat16").read(1, 6).items():
            np.testing.assert_array_equal(array, found["segments"][2][name][0, 6])

    def test_what_keeps_it_from_being_loaded(self, tmp_path: Path) -> None:
        raw = WIDE | {"quantization_config": FLOAT8}
        with pytest.raises(CheckpointError, match=r"expected dtype F8_E4M3, found BF16"):
            open_checkpoint(write(tmp_path, random_tensors(WIDE, BFLOAT16), raw))
        with pytest.raises(CheckpointError, match=r"quantization_config: found .*gptq.*expected quant_method 'fp8'"):
            open_checkpoint(write(tmp_path, {}, WIDE | {"quantization_config": {"quant_method": "gptq"}}))
        narrow, _ = float8_tensors()
        scale = next(name for name in narrow if name.endswith("scale_inv"))
        del narrow[scale]
        with pytest.raises(CheckpointError, match=rf"{scale} is missing; expected shape \("):
            open_checkpoint(write(tmp_path, narrow, raw))

    def test_dummy(self, tmp_path: Path) -> None:
        """Random experts of the same spread as those that are not 8-bit."""
        path = write(tmp_path, {}, WIDE | {"quantization_config": FLOAT8, "dtype": "bfloat16"})
        checkpoint = open_checkpoint(path, "dummy")
        slots = np.array([[3, -1], [0, 7], [5, 5]], np.int32)
        narrow, wide = (load_params(c, slots, device(), "bfloat16") for c in (checkpoint, widened(checkpoint)))
        for name in ("experts_gate_up", "experts_down"):
            weights, scales = (np.asarray(narrow["segments"][0][n])[0] for n in (name, f"{name}_scales"))
            assert weights.dtype == ml_dtypes.float8_e4m3fn and not weights[1].any()
            spread = dequantize(weights[0], scales[0]).astype(np.float32).std()
            assert spread == pytest.approx(np.asarray(wide["segments"][0][name], np.float32)[0, 0].std(), rel=0.03)
        one = ExpertReader(checkpoint, "bfloat16").read(1, 7)
        np.testing.assert_array_equal(one["experts_down"], narrow["segments"][2]["experts_down"][0, 1])


class TestDummy:
    def test_an_expert_is_the_same_wherever_it_is_held(self, tmp_path: Path) -> None:
        write(tmp_path, {}, raw={**QWEN, "dtype": "bfloat16"})
        checkpoint = open_checkpoint(tmp_path, "dummy")
        everything = all_experts(tmp_path, load_format="dummy")
        some = load_params(checkpoint, np.array([[5, -1], [-1, 2], [1, 0]]), device(), "float32")
        for name in ("experts_gate_up", "experts_down"):
            a, b = (np.asarray(p["segments"][2][name]) for p in (everything, some))
            assert a.dtype == BFLOAT16
            np.testing.assert_array_equal(b[0, 1], a[0, 2])
            np.testing.assert_array_equal(b[1], a[1, [1, 0]])
            assert not b[0, 0].any()
            assert not np.array_equal(a[0, 0], a[1, 0]) and not np.array_equal(a[0, 0], a[0, 1])
        for array in jax.tree.leaves(everything):
            assert array.committed and np.isfinite(np.asarray(array, np.float32)).all()

    def test_a_config_is_all_it_takes(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(QWEN))
        open_checkpoint(tmp_path, "dummy")
        open_checkpoint(tmp_path / "config.json", "dummy")
        with pytest.raises(CheckpointError, match="found neither"):
            open_checkpoint(tmp_path)


class TestServing:
    """The Orbax form."""

    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
    def test_same_bits(self, dtype: Any, tmp_path: Path) -> None:
        path = write(tmp_path / "a", random_tensors(QWEN, dtype))
        convert(path, tmp_path / "b")
        assert_same(all_experts(path), all_experts(tmp_path / "b"))
        convert(tmp_path / "b", tmp_path / "c")
        assert_same(all_experts(path), all_experts(tmp_path / "c"))

    def test_other_files_are_copied_and_weights_are_not(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "pytorch_model.bin"):
            (path / name).write_text(name)
        convert(path, tmp_path / "b")
        assert {f.name for f in (tmp_path / "b").iterdir()} == {
            "config.json",
            "serving.json",
            "top",
            "layers",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }

    def test_never_half_written_never_overwritten(self, tmp_path: Path) -> None:
        tensors = random_tensors(QWEN)
        tensors["model.layers.3.mlp.gate.weight"][0, 0] = np.nan
        with pytest.raises(CheckpointError, match="NaN"):
            convert(write(tmp_path / "a", tensors), tmp_path / "b")
        assert [f.name for f in tmp_path.iterdir()] == ["a"]
        (tmp_path / "b").mkdir()
        with pytest.raises(CheckpointError, match="b: already exists; expected a new directory"):
            convert(write(tmp_path / "a"), tmp_path / "b")

    def test_orbax_restores_it(self, tmp_path: Path) -> None:
        ocp = pytest.importorskip("orbax.checkpoint")
        tensors = random_tensors(QWEN)
        convert(write(tmp_path / "a", tensors), tmp_path / "b")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            layer = checkpointer.restore((tmp_path / "b/layers/002").resolve())
        np.testing.assert_array_equal(layer["experts_down"][3], tensors[EXPERT].T)

    @pytest.mark.parametrize("damage", ["marker", "missing", "shape", "truncated"])
    def test_damage_is_named(self, damage: str, tmp_path: Path) -> None:
        convert(write(tmp_path / "a"), tmp_path / "b")
        if damage == "marker":
            (tmp_path / "b/serving.json").write_text("{}")
        elif damage == "missing":
            for file in sorted((tmp_path / "b/layers/002").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
        elif damage == "shape":
            (tmp_path / "b/config.json").write_text(json.dumps({**QWEN, "num_experts": 16}))
        else:
            for file in (tmp_path / "b/layers/002").rglob("d/*"):
                os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=r"/b/(serving.json|layers/\d\d\d: \w+: )") as error:
            all_experts(tmp_path / "b")
        assert "\n" not in str(error.value)


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = random_tensors(QWEN)
        write(path, tensors | {name: edit(tensors[name])})

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: save_file(
        {n: t for n, t in random_tensors(QWEN).items() if n != name}, path / "model.safetensors"
    )


def damage(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return apply


def reconfigure(**fields: Any) -> Callable[[Path], Any]:
    return lambda path: (path / "config.json").write_text(json.dumps({**QWEN, **fields}))


def with_nan(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 5, np.nan, array).astype(array.dtype)


MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        remove(EXPERT),
        rf"/model\.safetensors: tensor {EXPERT} .*is missing; expected shape \(32, 16\)",
    ),
    "missing router": (remove(ROUTER), rf"tensor {ROUTER} is missing; expected shape \(8, 32\)"),
    "wrong shape": (
        change(EXPERT, lambda a: a[:, :8]),
        rf"tensor {EXPERT}: expected shape \(32, 16\), found \(32, 8\)",
    ),
    "wrong dtype": (
        change(EXPERT, lambda a: a.astype(np.int32)),
        rf"tensor {EXPERT}: expected dtype .*F32.*, found I32",
    ),
    "fp8 without scales": (
        change(EXPERT, lambda a: a.astype(ml_dtypes.float8_e4m3fn)),
        rf"tensor {EXPERT}_scale_inv is missing; expected shape \(1, 1\)",
    ),
    "NaN router": (change(ROUTER, with_nan), rf"tensor {ROUTER}: expected finite numbers, found 1 NaN or Inf"),
    "truncated": (damage(lambda b: b[:-100]), r"/model\.safetensors: truncated: tensor .* but the file has \d+ bytes"),
    "truncated header": (damage(lambda b: b[:500]), r"/model\.safetensors: truncated, or not safetensors"),
    "empty": (damage(lambda b: b""), r"/model\.safetensors: truncated, or not safetensors"),
    "garbage": (damage(lambda b: b[:8] + b"\xff" * (len(b) - 8)), r"expected a JSON header, found something else"),
    "not a header": (damage(lambda b: (2).to_bytes(8, "little") + b"[]"), r"expected a JSON object, found list"),
    "bad entry": (
        damage(lambda b: (7).to_bytes(8, "little") + b'{"a":1}'),
        r"tensor a: expected dtype, shape and data_offsets, found 1",
    ),
    "unknown model_type": (reconfigure(model_type="llama"), r"/config\.json: model_type 'llama' is not supported"),
    "missing field": (reconfigure(hidden_size=None), r"/config\.json: hidden_size: expected an integer"),
    "no config": (lambda path: (path / "config.json").unlink(), r"/config\.json: cannot be read"),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        r"expected model\.safetensors or .*, found neither",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    spoil, message = MALFORMED[case]
    spoil(write(tmp_path / "m"))
    with pytest.raises(CheckpointError, match=message) as error:
        all_experts(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value) and "\n" not in str(error.value)


def test_malformed_index(tmp_path: Path) -> None:
    path = split(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]

    index.write_text(json.dumps({"weight_map": weights | {EXPERT: "c.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json: names the shard c\.safetensors, which is not in"):
        open_checkpoint(path)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weights[EXPERT]]
    index.write_text(json.dumps({"weight_map": weights | {EXPERT: other}}))
    with pytest.raises(CheckpointError, match=rf"{other}: tensor {EXPERT} is missing, but"):
        open_checkpoint(path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: expected a JSON object with a weight_map"):
        open_checkpoint(path)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: expected a directory with a config\.json, found nothing"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: expected a directory with a config\.json, found a file"):
        open_checkpoint(tmp_path / "file")


def write_large(path: Path, layers: int, hidden: int, inner: int) -> Path:
    """A float32 model of 32 experts, mostly experts, written without holding it in memory."""
    raw = {
        **QWEN,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": 32,
        "mlp_only_layers": [],
    }
    shapes = {}
    config = parse_hugging_face(raw)
    for _, param, first, count in iterate(config):
        for layer in range(first, first + max(count, 1)):
            for expert in range(32) if param.expert else [None]:
                source = param.sources[0]
                for name, shape in zip(source.names, source.shapes, strict=True):
                    shapes[name.format(layer=layer, expert=expert)] = shape
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32).tobytes()
    with (path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        while offset:
            offset -= f.write(block[:offset])
    return path


MEASURE = """
import sys, jax, numpy as np
from moe_jax.checkpoint import load_params, open_checkpoint

def number(file, field):
    return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(field))

checkpoint = open_checkpoint(sys.argv[1])
slots = np.tile(np.arange(8, 16, dtype=np.int32), (checkpoint.config.num_moe_layers, 1))  # a quarter
jax.jit(lambda x: x + 1)(np.zeros(4)).block_until_ready()
memory, read = number("status", "VmRSS"), number("io", "rchar")
params = jax.block_until_ready(load_params(checkpoint, slots, jax.local_devices()[0], sys.argv[2]))
share = sum(x.nbytes for x in jax.tree.leaves(params))
print(share, 1024 * (number("status", "VmHWM") - memory), number("io", "rchar") - read)
"""


def measure(path: Path, dtype: str = "float32") -> tuple[int, int, int]:
    """Bytes: a rank's share when it holds a quarter of the experts, the peak of memory above the start, bytes read."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", MEASURE, str(path), dtype]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True).stdout
    share, peak, read = map(int, out.split())
    return share, peak, read


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts memory and bytes read through Linux's /proc")
class TestCost:
    def test_a_rank_reads_and_holds_its_share(self, tmp_path: Path) -> None:
        path = write_large(tmp_path / "m", layers=8, hidden=256, inner=1024)  # 0.8 GB
        share, peak, read = measure(path)
        assert share > 200e6
        assert peak <= 1.3 * share
        assert read <= 1.01 * share

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_two_gigabytes(self, dtype: str, tmp_path: Path) -> None:
        path = write_large(tmp_path / "m", layers=10, hidden=512, inner=1024)  # 2 GB
        share, peak, _ = measure(path, dtype)
        assert peak <= 1.3 * share
        convert(path, tmp_path / "serving")
        share, peak, _ = measure(tmp_path / "serving", dtype)
        assert peak <= 1.3 * share

    def test_one_slot_of_a_serving_checkpoint_reads_its_bytes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a", raw=(raw := {**QWEN, "hidden_size": 256, "moe_intermediate_size": 256}),
                     tensors=random_tensors(raw))  # fmt: skip
        convert(path, tmp_path / "b")
        checkpoint = open_checkpoint(tmp_path / "b")

        def bytes_read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        reader = ExpertReader(checkpoint, "float32")
        before = bytes_read()
        expert = reader.read(2, 4)
        assert bytes_read() - before <= 1.1 * sum(a.nbytes for a in expert.values())
