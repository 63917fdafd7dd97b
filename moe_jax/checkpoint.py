"""From a checkpoint on disk to a rank's parameters, whatever form the checkpoint has.

    checkpoint = open_checkpoint(path)
    params = load_params(checkpoint, slot_experts, device, "float32", keep_expert_dtype=True)

A rank reads the experts in its slots and no others. On the way to the device it holds one layer of one parameter.
Which experts those are is the placement's business, and what a parameter is, `moe_jax.params`'.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import ml_dtypes
import numpy as np

from moe_jax.config import ConfigError, ModelConfig
from moe_jax.dummy_checkpoint import DummyCheckpoint
from moe_jax.hugging_face import HuggingFaceCheckpoint, dequantize
from moe_jax.params import SCALES, Param, iterate, layer_params
from moe_jax.scratch import scratch
from moe_jax.small import Call, direct, filled, set_row
from moe_jax.tensor_file import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ExpertReader",
    "convert",
    "load_params",
    "open_checkpoint",
    "param_types",
    "widened",
]

Prepare = Callable[[str, jax.Array], jax.Array]
"""(name of an expert parameter, [..., in, out], donated) -> the same as an engine's programs want it."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_READERS = 4  # threads; each holds an expert


class Checkpoint(Protocol):
    """Where parameters come from. `path` and `param` are as in `moe_jax.params.iterate`; `layer` counts all layers."""

    config: ModelConfig

    def read(self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None) -> np.ndarray:
        """`param.shape`, in the checkpoint's dtype. `expert` is given exactly for expert parameters."""
        ...

    def dtype(self, path: tuple[Any, ...], param: Param, layer: int) -> np.dtype:
        """What `read` will return, without reading it."""
        ...


def open_checkpoint(path: str | Path, load_format: Literal["auto", "dummy"] = "auto") -> Checkpoint:
    """A Hugging Face directory, a serving checkpoint (`convert`), or with "dummy" random weights for a config.json.

    Raises CheckpointError, one line that names the file, for whatever keeps it from being loaded.
    """
    path = Path(path)
    if not path.is_dir() and not (load_format == "dummy" and path.is_file()):
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(f"{path}: expected a directory with a config.json, found {found}")
    try:
        config = ModelConfig.from_json(path)
    except ConfigError as e:
        raise CheckpointError(str(e)) from None
    if load_format == "dummy":
        return DummyCheckpoint(config, _declared_dtype(path))
    if (path / "serving.json").exists():
        from moe_jax.orbax_checkpoint import OrbaxCheckpoint

        return OrbaxCheckpoint(path, config)
    return HuggingFaceCheckpoint(path, config)


class _Widened:
    """A checkpoint with 8-bit experts as one with bfloat16 experts, for programs that multiply no others."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self._checkpoint = replace(checkpoint.config, float8_experts=False), checkpoint
        self._experts = layer_params(checkpoint.config, moe=True)

    def read(self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None) -> np.ndarray:
        if not param.expert:
            return self._checkpoint.read(path, param, layer, expert)
        *segment, name = path
        weights, scales = (
            self._checkpoint.read((*segment, n), self._experts[n], layer, expert).copy() for n in (name, name + SCALES)
        )
        return dequantize(weights, scales)

    def dtype(self, path: tuple[Any, ...], param: Param, layer: int) -> np.dtype:
        return _BFLOAT16 if param.expert else self._checkpoint.dtype(path, param, layer)


def widened(checkpoint: Checkpoint) -> Checkpoint:
    """The same with 8-bit experts multiplied by their scales, as bfloat16. (Dummy experts are drawn as such.)"""
    if not checkpoint.config.float8_experts:
        return checkpoint
    return checkpoint.widened() if isinstance(checkpoint, DummyCheckpoint) else _Widened(checkpoint)


def _declared_dtype(path: Path) -> np.dtype:
    raw = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    return _BFLOAT16 if "bfloat16" in (raw.get("dtype"), raw.get("torch_dtype")) else np.dtype(np.float32)


def convert(source: str | Path, target: str | Path) -> None:
    """Write any checkpoint as a serving checkpoint, slot-addressable (see `moe_jax.orbax_checkpoint`).

    Raises CheckpointError when `source` is malformed or `target` exists.
    """
    from moe_jax.orbax_checkpoint import write

    write(open_checkpoint(source), Path(source), Path(target))


def load_params(
    checkpoint: Checkpoint,
    slot_experts: np.ndarray,
    device: jax.Device,
    dtype: Literal["float32", "bfloat16"],
    keep_expert_dtype: bool = True,
    call: Call = direct,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    """A rank's parameters, shaped as `moe_jax.params.stacked_shapes` says, committed to `device`.

    slot_experts: int [MoE layers, slots], the expert in each slot of this rank; -1 leaves a slot empty, all zeros.
    dtype: of all but routers, which are float32, and, with `keep_expert_dtype`, experts that are bfloat16 on disk.
    prepare: what becomes of a layer's experts on the device before they are put among the others.
    """
    if slot_experts.ndim != 2 or len(slot_experts) != checkpoint.config.num_moe_layers:
        expected = f"[{checkpoint.config.num_moe_layers}, slots]"
        raise ValueError(f"slot_experts: expected {expected}, found {list(slot_experts.shape)}")
    params: dict[str, Any] = {"segments": [{} for _ in checkpoint.config.segments]}
    first_moe = first_moe_layers(checkpoint.config)
    for path, param, first, layers in iterate(checkpoint.config):
        target = _target_dtype(checkpoint, path, param, dtype, keep_expert_dtype)
        experts = None
        if param.expert:
            experts = slot_experts[first_moe[path[1]] : first_moe[path[1]] + layers]
        *segment, name = path
        place = params["segments"][segment[1]] if segment else params
        if layers:
            rows = _layers(checkpoint, path, param, range(first, first + layers), experts, target, device, call)
            if experts is not None and prepare is not None:
                rows = (prepare(name, jax.device_put(row, device)) for row in rows)
            place[name] = _stack(rows, layers, device, call)
        elif isinstance(checkpoint, DummyCheckpoint):
            place[name] = checkpoint.draw(path, param, 0, None, target, device, call)
        else:
            array = checkpoint.read(path, param, 0, None)
            place[name] = jax.device_put(array.astype(target, order="C", copy=False), device)
    return params


def param_types(checkpoint: Checkpoint, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """The dtypes of what `load_params` returns, in the same pytree, without loading anything."""
    types: dict[str, Any] = {"segments": [{} for _ in checkpoint.config.segments]}
    for path, param, _, _ in iterate(checkpoint.config):
        *segment, name = path
        place = types["segments"][segment[1]] if segment else types
        place[name] = _target_dtype(checkpoint, path, param, dtype, True)
    return types


class ExpertReader:
    """Single experts of a checkpoint, typed as `load_params` would. What does not depend on the expert is looked up
    once: whoever reads beside steps takes the interpreter's lock from them."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: Literal["float32", "bfloat16"], keep_expert_dtype: bool = True
    ) -> None:
        self._checkpoint = checkpoint
        config = checkpoint.config
        self._layers = [i for i, moe in enumerate(config.moe_layers) if moe]
        self._params = {
            (path[-1], layer): (path, param)
            for path, param, first, layers in iterate(config)
            if param.expert
            for layer in range(first, first + layers)
        }
        self._types: dict[str, np.dtype] = {}
        for name in dict.fromkeys(name for name, _ in self._params):
            path, param = self._params[name, self._layers[0]]
            self._types[name] = _target_dtype(checkpoint, path, param, dtype, keep_expert_dtype)

    def read(self, moe_layer: int, expert: int, call: Call = direct) -> dict[str, np.ndarray]:
        """Each expert parameter, as `param.shape`. moe_layer counts layers with experts."""
        checkpoint, layer = self._checkpoint, self._layers[moe_layer]
        arrays: dict[str, np.ndarray] = {}
        for name, dtype in self._types.items():
            at = *self._params[name, layer], layer, expert
            array = checkpoint.read(*at, call) if isinstance(checkpoint, DummyCheckpoint) else checkpoint.read(*at)
            arrays[name] = array.astype(dtype, order="C", copy=False)
        return arrays


def first_moe_layers(config: ModelConfig) -> list[int]:
    """The row of `slot_experts` at which each segment begins."""
    starts = [0]
    for moe, _, layers in config.segments:
        starts.append(starts[-1] + (layers if moe else 0))
    return starts


def _target_dtype(
    checkpoint: Checkpoint, path: tuple[Any, ...], param: Param, dtype: str, keep_expert_dtype: bool
) -> np.dtype:
    if param.float32 or param.float8:
        return np.dtype(np.float32) if param.float32 else _FLOAT8
    if param.expert and keep_expert_dtype:
        same = [p for p in iterate(checkpoint.config) if p[0][-1] == path[-1]]  # in every segment
        stored = {checkpoint.dtype(at, p, layer) for at, p, first, n in same for layer in range(first, first + n)}
        if stored == {_BFLOAT16}:
            return _BFLOAT16
    return _BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)


def _layers(
    checkpoint: Checkpoint,
    path: tuple[Any, ...],
    param: Param,
    layers: range,
    experts: np.ndarray | None,
    dtype: np.dtype,
    device: jax.Device,
    call: Call,
) -> Iterator[np.ndarray | jax.Array]:
    """One parameter layer by layer. A yielded array holds until the next one is asked for."""
    if isinstance(checkpoint, DummyCheckpoint):
        for i, layer in enumerate(layers):
            yield checkpoint.draw(path, param, layer, None if experts is None else experts[i], dtype, device, call)
        return
    if experts is None:
        for layer in layers:
            yield checkpoint.read(path, param, layer, None).astype(dtype, order="C", copy=False)
        return
    buffer = scratch((experts.shape[1], *param.shape), dtype)

    def fill(layer: int, slot: int, expert: int) -> None:
        buffer[slot] = checkpoint.read(path, param, layer, expert) if expert >= 0 else 0

    with ThreadPoolExecutor(_READERS) as pool:
        for layer, row in zip(layers, experts.tolist(), strict=True):
            list(pool.map(partial(fill, layer), range(len(row)), row))
            yield buffer


def _stack(rows: Iterator[np.ndarray | jax.Array], count: int, device: jax.Device, call: Call) -> jax.Array:
    """Fill one device array with so many rows, in place, so that nothing bigger than a row is held besides."""
    stack: jax.Array | None = None
    for i, row in enumerate(rows):
        if stack is None:
            stack = call(filled, device, np.float32(0), shape=(count, *row.shape), dtype=row.dtype)
        # Waiting lets `rows` write its next row where this one was, and keeps rows from piling up.
        stack = call(set_row, device, stack, row, np.array([i], np.int32)).block_until_ready()
    assert stack is not None
    return stack
