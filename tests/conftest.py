"""JAX as the tests want it, set before any test module uses it: the CPU, four virtual devices, one summation order."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One place for the programs of all clusters: what a test has compiled no other compiles again.
os.environ.setdefault("MOE_JAX_CACHE", str(Path(__file__).parents[1] / ".cache" / "programs"))

import jax
from hypothesis import settings

from moe_jax.distributed import set_cpu_devices

# `LLM(ranks_per_host=n)` can ask for devices only before JAX is first used: the first test would decide for all.
set_cpu_devices(4)
jax.devices()

settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if "CI" in os.environ else "local")
