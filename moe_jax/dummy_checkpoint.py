"""Random weights from a config alone, drawn on the device, for benchmarks (`--load-format dummy`).

An expert's weights depend on the seed, its layer and its number only, not on the rank or slot that holds it.
"""

from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.params import BLOCK, SCALES, Param
from moe_jax.small import Call, direct

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_MOST = float(ml_dtypes.finfo(_FLOAT8).max)


class DummyCheckpoint:
    """See `moe_jax.checkpoint.Checkpoint`."""

    def __init__(self, config: ModelConfig, dtype: np.dtype, seed: int = 0):
        self.config = config
        self._stored = dtype
        self._seed = seed

    def read(
        self, path: tuple[Any, ...], param: Param, layer: int, expert: int | None, call: Call = direct
    ) -> np.ndarray:
        experts = None if expert is None else np.array([expert])
        device = jax.local_devices()[0]
        array = self.draw(path, param, layer, experts, self.dtype(path, param, layer), device, call)
        return np.asarray(array).reshape(param.shape)

    def dtype(self, path: tuple[Any, ...], param: Param, layer: int) -> np.dtype:
        if param.float8:
            return _FLOAT8
        return np.dtype(np.float32) if param.float32 else self._stored

    def widened(self) -> "DummyCheckpoint":
        """The same model with experts that are not 8-bit; other random numbers."""
        return DummyCheckpoint(replace(self.config, float8_experts=False), self._stored, self._seed)

    def draw(
        self,
        path: tuple[Any, ...],
        param: Param,
        layer: int,
        experts: np.ndarray | None,
        dtype: np.dtype,
        device: jax.Device,
        call: Call = direct,
    ) -> jax.Array:
        """dtype [*shape]; with `experts` (int [slots], -1: empty) dtype [slots, *shape]."""
        leading = () if experts is None else experts.shape
        owners = np.zeros(1, int) if experts is None else experts
        numbers = np.stack([np.full_like(owners, layer), owners], axis=1)
        mean, deviation = _spread(path[-1], param)
        if deviation == 0:
            return jax.device_put(np.full((*leading, *param.shape), mean, dtype), device)
        seed = np.uint32(crc32(f"{self._seed} {path[-1]}".encode()))
        return call(
            _draw,
            device,
            seed,
            numbers.astype(np.int32),
            leading=leading,
            shape=param.shape,
            deviation=deviation,
            stored=self.dtype(path, param, 0),
            dtype=dtype,
        )


def _spread(name: str, param: Param) -> tuple[float, float]:
    """Mean and standard deviation. Norms are 1, biases 0, matrices 1 / sqrt(fan in): activations keep their size."""
    if name.endswith("norm"):
        return 1.0, 0.0
    if len(param.shape) == 1:
        return 0.0, 0.0
    if param.float8:  # all of the type's range, which scales bring back
        return 0.0, _MOST / 3**0.5
    if name.endswith(SCALES):
        return (param.shape[-2] * BLOCK / 3) ** -0.5 / _MOST, 0.0
    fan_in = param.shape[-1] if name == "k_up" else param.shape[-2]
    return 0.0, 0.02 if name == "embed" else fan_in**-0.5


@partial(jax.jit, static_argnames=("leading", "shape", "deviation", "stored", "dtype"))
def _draw(
    seed: jax.Array,
    numbers: jax.Array,
    leading: tuple[int, ...],
    shape: tuple[int, ...],
    deviation: float,
    stored: np.dtype,
    dtype: np.dtype,
) -> jax.Array:
    """[*leading, *shape] for int [n, (layer, expert)]; one at a time: nothing bigger than one is held besides."""

    def one(number: jax.Array) -> jax.Array:
        # Philox: 64 bits of key and a counter; it compiles and runs faster than jax.random's own.
        place = ((number[0] << 16) | (number[1] & 0xFFFF)).astype(jnp.uint32)
        state = jnp.stack([seed, place, jnp.uint32(0), jnp.uint32(0)])
        _, bits = jax.lax.rng_bit_generator(state, shape, algorithm=jax.lax.RandomAlgorithm.RNG_PHILOX)
        # Uniform, from integers: one multiplication, which no fusion can round otherwise.
        values = ((bits >> 16).astype(jnp.int32) - 32768).astype(jnp.float32) * np.float32(deviation * 3**0.5 / 32768)
        return jnp.where(number[1] >= 0, values, 0).astype(stored).astype(dtype)

    return jax.lax.map(one, numbers).reshape(*leading, *shape)
