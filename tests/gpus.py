"""Programs lowered for a GPU where there is none."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh


def on_a_gpu() -> Any:
    """So that Triton's kernels are lowered for one."""
    device = getattr(jax.sharding, "AbstractDevice")("NVIDIA H200", 132, "gpu")  # noqa: B009  not in jax 0.10
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))  # type: ignore[call-arg]


def lower(f: Callable[..., Any], *args: Any) -> str:
    with on_a_gpu():
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
