"""Serving checkpoints: written once by `moe-jax convert`, from which any expert loads without reading the rest.

    DIR/serving.json             marks the directory and its version
    DIR/top, DIR/layers/NNN      an Orbax checkpoint each: {parameter: array}, named and shaped as in moe_jax.params
    DIR/config.json, tokenizer…  copies

Expert parameters are stacked, [experts, in, out]; no chunk has more than one expert. A checkpoint a layer keeps the
memory of converting at one layer. Orbax writes, and restores whole layers; single experts are read through
TensorStore, the array library underneath it, because Orbax has no public way to restore a part of an array by index.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from moe_jax.config import ModelConfig
from moe_jax.params import Param, iterate
from moe_jax.scratch import scratch
from moe_jax.tensor_file import CheckpointError

MARKER = "serving.json"
_FORMAT = {"format": "moe-jax serving checkpoint", "version": 1}
_CHUNK = 1 << 20  # bytes; a reader holds some chunks, packed and unpacked: with an expert in each, 30 MB more
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".gguf")  # suffixes that are not copied


class OrbaxCheckpoint:
    """See `moe_jax.checkpoint.Checkpoint`."""

    def __init__(self, path: Path, config: ModelConfig):
        self.config = config
        self._path = path
        self._arrays: dict[tuple[str, int], ts.TensorStore] = {}
        try:
            found = json.loads((path / MARKER).read_text())
        except (OSError, ValueError):
            found = None
        if found != _FORMAT:
            raise CheckpointError(f"{path / MARKER}: expected {_FORMAT}, found {str(found):.80}")
        for at, param, first, layers in iterate(config):
            for layer in range(first, first + max(layers, 1)):
                self._open(at, param, layer)

    def read(self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None) -> np.ndarray:
        store = self._open(path, param, layer)
        try:
            part = store if expert is None else store[expert]
            array = scratch(part.shape, part.dtype.numpy_dtype)
            ts.array(array, copy=False).write(part).result()
        except ValueError as e:
            raise CheckpointError(f"{self._where(path, layer)}: damaged: {' '.join(str(e).split())[:200]}") from None
        if param.float32 and not np.isfinite(array).all():
            raise CheckpointError(f"{self._where(path, layer)}: expected finite numbers, found NaN or Inf")
        return array

    def dtype(self, path: tuple[Any, ...], param: Param, layer: int) -> np.dtype:
        return self._open(path, param, layer).dtype.numpy_dtype

    def _where(self, path: tuple[Any, ...], layer: int) -> str:
        return f"{self._path / _part(path, layer)}: {path[-1]}"

    def _open(self, path: tuple[Any, ...], param: Param, layer: int) -> ts.TensorStore:
        key = (path[-1], layer)
        if key not in self._arrays:
            base = str((self._path / _part(path, layer)).resolve())
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{base}", "path": f"{path[-1]}/"},
                "recheck_cached_data": "open",
            }
            expected = (self.config.num_experts, *param.shape) if param.expert else param.shape
            try:
                store = ts.open(spec, open=True, read=True).result()
            except ValueError as e:
                reason = " ".join(str(e).split())[:200]
                raise CheckpointError(
                    f"{self._where(path, layer)}: cannot be opened; expected an array of shape {expected} ({reason})"
                ) from None
            if store.shape != expected:
                raise CheckpointError(f"{self._where(path, layer)}: expected shape {expected}, found {store.shape}")
            self._arrays[key] = store
        return self._arrays[key]


def _part(path: tuple[Any, ...], layer: int) -> Path:
    """The Orbax checkpoint, relative to the directory, that holds a parameter."""
    return Path("top") if len(path) == 1 else Path("layers") / f"{layer:03d}"


def write(checkpoint: Any, source: Path, target: Path) -> None:
    """Write `checkpoint`, which was opened from `source`, as a serving checkpoint; all of it, or nothing.

    Raises CheckpointError when `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target}: already exists; expected a new directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write_arrays(checkpoint, unfinished)
        for file in source.iterdir() if source.is_dir() else [source]:
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != MARKER:
                shutil.copyfile(file, unfinished / file.name)
        (unfinished / MARKER).write_text(json.dumps(_FORMAT))
        os.rename(unfinished, target)  # fails, rather than replaces, when another writer was faster
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written ({e.strerror or e})") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrays(checkpoint: Any, directory: Path) -> None:
    import orbax.checkpoint as ocp  # takes seconds to import, and only writing needs it

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of chunks below 1 MiB: ours are one expert
    config: ModelConfig = checkpoint.config
    parts: dict[Path, list[tuple[tuple[Any, ...], Param, int]]] = {}
    for path, param, first, layers in iterate(config):
        for layer in range(first, first + max(layers, 1)):
            parts.setdefault(_part(path, layer), []).append((path, param, layer))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for part, members in parts.items():
            arrays = {path[-1]: _whole(checkpoint, path, param, layer) for path, param, layer in members}
            chunks = {
                path[-1]: ocp.SaveArgs(shard_axes=(0,) if param.expert else (), chunk_byte_size=_CHUNK)
                for path, param, _ in members
            }
            checkpointer.save((directory / part).resolve(), args=ocp.args.PyTreeSave(arrays, save_args=chunks))


def _whole(checkpoint: Any, path: tuple[Any, ...], param: Param, layer: int) -> np.ndarray:
    if not param.expert:
        return np.ascontiguousarray(checkpoint.read(path, param, layer, None))
    experts = checkpoint.config.num_experts
    array = np.empty((experts, *param.shape), checkpoint.dtype(path, param, layer))
    for expert in range(experts):
        array[expert] = checkpoint.read(path, param, layer, expert)
    return array
