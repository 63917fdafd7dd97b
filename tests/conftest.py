"""JAX as the tests want it, set before any test module uses it: the CPU, four virtual devices, one summation order."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import settings

from moe_jax.distributed import keep_programs, set_cpu_devices
from serving.environment import compilation_cache

# `LLM(ranks_per_host=n)` can ask for devices only before JAX is first used: the first test would decide for all.
set_cpu_devices(4)
jax.devices()

# Each LLM compiles anew what another of the same shape has compiled. A program from here still counts as compiled.
cache = compilation_cache("cpu", Path(__file__).parents[1] / ".cache" / "xla", os.environ)
keep_programs(str(cache), share=False, timeout_s=0)

settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if "CI" in os.environ else "local")
