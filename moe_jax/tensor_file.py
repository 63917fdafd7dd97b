"""Reading safetensors files, one slice at a time.

The format: 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the tensors'
bytes (https://huggingface.co/docs/safetensors). Slices are read with `pread`, not mapped: mapped pages count as the
process's memory for as long as the kernel likes, and a file that shrinks under a mapping kills the process.
It knows nothing of models.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_jax.scratch import scratch

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    size: int  # bytes


class TensorFile:
    """The header of one safetensors file, checked against the file's size, and its tensors on demand."""

    def __init__(self, path: Path):
        """Raises CheckpointError when the file is missing, truncated or not safetensors."""
        self.path = path
        try:
            with path.open("rb") as f:
                total = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if total < 8 or length > min(total - 8, _MAX_HEADER):
                    raise CheckpointError(
                        f"{path}: truncated, or not safetensors: the header has {length} bytes, the file {total}"
                    )
                header = json.loads(f.read(length))
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
        except (ValueError, RecursionError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{path}: not safetensors: expected a JSON header, found something else") from None
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: not safetensors: expected a JSON object, found {type(header).__name__}")
        header.pop("__metadata__", None)
        self.tensors = {name: self._parse(name, entry, 8 + length, total) for name, entry in header.items()}

    def _parse(self, name: str, entry: object, base: int, total: int) -> Tensor:
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end - start)):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            expected = "expected dtype, shape and data_offsets"
            raise CheckpointError(f"{self.path}: tensor {name}: {expected}, found {str(entry):.80}") from None
        if base + end > total:
            raise CheckpointError(
                f"{self.path}: truncated: tensor {name} ends at byte {base + end}, but the file has {total} bytes"
            )
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - start:
            raise CheckpointError(
                f"{self.path}: tensor {name}: {dtype} of shape {shape} needs "
                f"{math.prod(shape) * FLOATS[dtype].itemsize} bytes, found {end - start}"
            )
        return Tensor(dtype, shape, base + start, end - start)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """A tensor, or its `index`-th slice along the first axis; only those bytes are read."""
        tensor = self.tensors[name]
        shape, start = tensor.shape, tensor.start
        if index is not None:
            shape = shape[1:]
            start += index * (tensor.size // tensor.shape[0])
        array = scratch(shape, FLOATS[tensor.dtype])
        rest = memoryview(array.reshape(-1).view(np.uint8).data)
        with self.path.open("rb", buffering=0) as f:
            while rest:
                n = os.preadv(f.fileno(), [rest], start)
                if n == 0:
                    raise CheckpointError(f"{self.path}: truncated: tensor {name} lacks its last {len(rest)} bytes")
                rest, start = rest[n:], start + n
        return array
