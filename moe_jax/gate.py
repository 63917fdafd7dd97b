"""A gate before each collective of a GPU's programs, so that a lost epoch's step ends where it is.

A host hands a step to its GPU kernel by kernel, far ahead of it. When a peer dies, each collective that is in the
survivor's queue waits in vain before NCCL looks whether it was aborted: some milliseconds, and where ranks take turns
on one GPU a multiple of them. So whoever hands over waits before each collective until the device is at most so many
behind, and hands over nothing more once the epoch is over. Handing over is host code that XLA calls.

Waiting is worth it where collectives take longer than handing one over, and that is where ranks share a GPU: programs
have gates if $MOE_JAX_COLLECTIVES_AHEAD says how many may be in the queue beside the one that the device is at. Without
a C++ compiler they have none, and nothing else is different.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import jax

from moe_jax.config import ConfigError
from moe_jax.cpp import Library

_MOST = 63
_LIBRARY = Library(
    (Path(__file__).with_suffix(".cc"),),
    ("-O2",),
    (("gate", "gate_cpu", "cpu"), ("gate", "gate_cuda", "CUDA")),
    without="losing a host may take longer without gates before collectives",
)


@cache
def wanted() -> bool:
    """Whether programs are to have gates, and can: compiled if need be. They may be made and loaded afterwards."""
    value = os.environ.get("MOE_JAX_COLLECTIVES_AHEAD")
    if value is None:
        return False
    if not value.isdecimal() or int(value) > _MOST:
        raise ConfigError(f"MOE_JAX_COLLECTIVES_AHEAD: found {value!r}, expected a number from 0 to {_MOST}")
    library = _LIBRARY.load()
    if library is not None:
        library.moe_jax_set_ahead(ctypes.c_int(int(value)))
    return library is not None


def gate(x: jax.Array) -> jax.Array:
    """x, in place. A program that comes to it while gates are closed fails there with JaxRuntimeError."""
    same = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("moe_jax_gate", same, input_output_aliases={0: 0})(x)  # type: ignore[return-value]


def close(closed: bool) -> None:
    """All gates of this process, or with False open them. From any thread; where programs have some."""
    library = _LIBRARY.load()
    assert library is not None
    library.moe_jax_close_gates(ctypes.c_bool(closed))
