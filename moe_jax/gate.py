"""A gate before each collective of a GPU's programs, so that a lost epoch's step ends where it is.

A host hands a step to its GPU kernel by kernel, far ahead of it. When a peer dies meanwhile, what it has not handed
over itself will never be answered, and each collective in the survivor's queue waits in vain for milliseconds before
NCCL looks whether it was aborted. So whoever hands over looks before each: handing over is host code that XLA calls.
Without a C++ compiler programs have no gates, and nothing else is different.
"""

import ctypes
from pathlib import Path

import jax

from moe_jax.cpp import Library

_LIBRARY = Library(
    (Path(__file__).with_suffix(".cc"),),
    ("-O2",),
    ("gate",),
    ("cpu", "CUDA"),
    without="losing a host may take longer without gates before collectives",
)


def available() -> bool:
    """Whether programs can have gates; compiled if need be. They may be made and loaded afterwards."""
    return _LIBRARY.load() is not None


def gate(x: jax.Array) -> jax.Array:
    """x, in place. A program that comes to it while gates are closed fails there with JaxRuntimeError."""
    same = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("moe_jax_gate", same, input_output_aliases={0: 0})(x)  # type: ignore[return-value]


def close(closed: bool) -> None:
    """All gates of this process, or with False open them. From any thread; where they are `available`."""
    library = _LIBRARY.load()
    assert library is not None
    library.moe_jax_close_gates(ctypes.c_bool(closed))
