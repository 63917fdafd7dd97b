"""Hugging Face checkpoints: a directory with config.json and safetensors in one or many shards.

All headers are read and checked against `moe_jax.params` when the checkpoint is opened, so that what is missing or
misshapen is said at once and not in the middle of loading. Tensors are read one expert at a time, later.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.params import BLOCK, Param, Source, iterate
from moe_jax.tensor_file import FLOATS, CheckpointError, TensorFile

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class HuggingFaceCheckpoint:
    """See `moe_jax.checkpoint.Checkpoint`."""

    def __init__(self, path: Path, config: ModelConfig):
        self.config = config
        self._listing, self._files = _find_tensors(path)
        used = self._check()
        self._warn_of_the_rest(used)

    def read(self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None) -> np.ndarray:
        source, names = self._source(param, layer, expert)
        index = expert if source.fused else None
        array = source.build(*(self._read_tensor(name, index, param.float8) for name in names))
        if param.float32 and not np.isfinite(array).all():
            bad = np.count_nonzero(~np.isfinite(array))
            raise CheckpointError(
                f"{self._files[names[0]].path}: tensor {names[0]}: expected finite numbers, found {bad} NaN or Inf"
            )
        return array

    def dtype(self, path: tuple[Any, ...], param: Param, layer: int) -> np.dtype:
        if param.float8:
            return FLOATS["F8_E4M3"]
        _, names = self._source(param, layer, 0)
        stored = [FLOATS[self._files[name].tensors[name].dtype] for name in names]
        return np.result_type(*(_BFLOAT16 if d.itemsize == 1 else d for d in stored))

    def _source(self, param: Param, layer: int, expert: int | None) -> tuple[Source, list[str]]:
        """The first alternative that is there, and its tensors' names."""
        found: list[tuple[list[str], list[str], Source]] = []
        for source in param.sources:
            names = [name.format(layer=layer, expert=expert) for name in source.names]
            missing = [name for name in names if name not in self._files]
            if not missing:
                return source, names
            found.append((missing, names, source))
        missing, names, source = next((f for f in found if len(f[0]) < len(f[1])), found[0])
        shape = source.shapes[names.index(missing[0])]
        others = "".join(f" (or {f[0][0]})" for f in found if f[1] != names)
        raise CheckpointError(f"{self._listing}: tensor {missing[0]}{others} is missing; expected shape {shape}")

    def _check(self) -> set[str]:
        """Existence, shape and type of every tensor that the model needs; returns their names."""
        used = set()
        for _, param, first, layers in iterate(self.config):
            for layer in range(first, first + max(layers, 1)):
                for expert in range(self.config.num_experts) if param.expert else [None]:
                    source, names = self._source(param, layer, expert)
                    if used.issuperset(names):
                        break  # fused: one tensor for all experts
                    for name, shape in zip(names, source.shapes, strict=True):
                        self._expect(name, shape, ("F8_E4M3",) if param.float8 else tuple(FLOATS))
                        if self._files[name].tensors[name].dtype == "F8_E4M3":  # of experts, scales are parameters, too
                            used.add(self._check_scale(name, shape))
                    used.update(names)
        return used

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> str:
        scale, blocks = f"{name}_scale_inv", (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
        if scale not in self._files:
            raise CheckpointError(f"{self._files[name].path}: tensor {scale} is missing; expected shape {blocks}")
        self._expect(scale, blocks, ("F32",))
        return scale

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        file = self._files[name]
        found = file.tensors[name]
        if found.shape != shape:
            raise CheckpointError(f"{file.path}: tensor {name}: expected shape {shape}, found {found.shape}")
        if found.dtype not in dtypes:
            expected = " or ".join(dtypes)
            raise CheckpointError(f"{file.path}: tensor {name}: expected dtype {expected}, found {found.dtype}")

    def _read_tensor(self, name: str, index: int | None, narrow: bool) -> np.ndarray:
        array = self._files[name].read(name, index)
        if narrow or array.dtype.itemsize > 1:
            return array
        scale = f"{name}_scale_inv"
        return dequantize(array, self._files[scale].read(scale, index))

    def _warn_of_the_rest(self, used: set[str]) -> None:
        def ignored(name: str) -> bool:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            return (
                (layer is not None and int(layer[1]) >= self.config.num_layers)  # multi-token prediction
                or name.endswith("rotary_emb.inv_freq")
                or (name == "lm_head.weight" and self.config.tie_embeddings)
            )

        rest = sorted(name for name in self._files.keys() - used if not ignored(name))
        if rest:
            names = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
            warnings.warn(f"{self._listing}: tensors that this model does not use: {names}", stacklevel=4)


def dequantize(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float8_e4m3fn [m, n] times its block's scale, float32 [ceil(m / 128), ceil(n / 128)], as bfloat16.

    bfloat16 is what DeepSeek's own conversion gives (DeepSeek-V3, inference/fp8_cast_bf16.py).
    """
    rows, columns = weight.shape
    blocks = np.repeat(np.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return (weight.astype(np.float32) * blocks).astype(_BFLOAT16)


def _find_tensors(path: Path) -> tuple[Path, dict[str, TensorFile]]:
    """The file that lists the tensors, and the file in which each tensor lies."""
    listing = path / _INDEX
    if not listing.is_file():
        listing = path / _SINGLE
        if not listing.is_file():
            raise CheckpointError(f"{path}: expected {_SINGLE} or {_INDEX}, found neither")
        file = TensorFile(listing)
        return listing, dict.fromkeys(file.tensors, file)
    try:
        shard_of = json.loads(listing.read_text())["weight_map"]
        shards = {shard: path / shard for shard in sorted(set(shard_of.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{listing}: expected a JSON object with a weight_map from tensors to files") from None
    for shard, file in shards.items():
        if not file.is_file():
            raise CheckpointError(f"{listing}: names the shard {shard}, which is not in {path}")
    files = {shard: TensorFile(file) for shard, file in shards.items()}
    for name, shard in shard_of.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{files[shard].path}: tensor {name} is missing, but {_INDEX} says it is here")
    return listing, {name: files[shard] for name, shard in shard_of.items()}
