"""The environment variables that an engine process needs before it imports JAX, and where compiled programs are kept.

Which platform the engines will use is guessed here without touching a device: the process that starts them holds none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform as machine
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Platform = Literal["cpu", "cuda"]

_PACKAGES = ("moe_jax", "serving")
# Without the first three a rank whose peer is lost ends itself instead of raising.
_CUDA_FLAGS = (
    "--xla_gpu_nccl_terminate_on_error=false",
    "--xla_gpu_nccl_async_execution=true",
    "--xla_gpu_nccl_blocking_communicators=false",
    "--xla_gpu_shard_autotuning=false",  # or compiling waits for ranks that compile something else
)
# glibc's malloc has eight arenas a core by default, and threads that load an epoch's programs leave holes in those they
# happen to get: in ten epochs an engine's arenas grew from 80 to 200 MiB on 2 cores, with four to 100. What lies free
# in them is given back (serving.heap).
_ARENAS = {"MALLOC_ARENA_MAX": "4"}
_CUDA = {
    "XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE": "1",
    # Both say that a step is handed over by the thread that asks for it: so it is known when that is done
    # (serving.fences). The first once chose another client; since jax 0.10.2 there is only one.
    "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": "0",
    "PJRT_GPU_ENABLE_ASYNC_DISPATCH": "0",
    "NCCL_RAS_ENABLE": "0",  # its thread is one more to wait for in an abort
}


def host_labels(hosts: int, ranks_per_host: int) -> tuple[str, ...]:
    """Of each rank of a cluster that names its hosts itself."""
    return tuple(f"host{i}" for i in range(hosts) for _ in range(ranks_per_host))


def guess_platform(jax_platforms: str | None) -> Platform:
    """What JAX will choose: the first of `jax_platforms` if that is set, else a GPU if there are one and its plugin."""
    if jax_platforms:
        first = jax_platforms.split(",")[0].strip()
        if first not in ("cpu", "cuda", "gpu"):
            raise ValueError(f"JAX_PLATFORMS: found {jax_platforms!r}, expected cpu or cuda")
        return "cpu" if first == "cpu" else "cuda"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(importlib.util.find_spec(name) is not None for name in plugins)
    return "cuda" if has_plugin and Path("/dev/nvidiactl").exists() else "cpu"


def engine_environment(
    rank: int, platform: Platform, environ: Mapping[str, str], gpu: int | None = None
) -> dict[str, str]:
    """`environ` with what rank `rank`'s engine process needs: one device, and this package importable.

    gpu: which of this machine's visible GPUs it uses; the one of its rank by default, where all ranks are here.
    With MOE_JAX_SHARE_GPU=1 all ranks use the first GPU, and NCCL takes them for different machines.
    Raises ValueError when CUDA_VISIBLE_DEVICES names too few GPUs.
    """
    env = {**_ARENAS, **environ}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    # One device a process: with two, the survivors of a lost peer hang inside XLA.
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", env.get("XLA_FLAGS", "")).split()
    env["JAX_PLATFORMS"] = platform
    if platform == "cuda":
        names = {flag.split("=")[0] for flag in flags}
        flags += [flag for flag in _CUDA_FLAGS if flag.split("=")[0] not in names]
        env |= _CUDA  # whatever it says: by JAX's guide it may have the second otherwise, and survivors would crash
        shared = env.get("MOE_JAX_SHARE_GPU") == "1"
        visible = env.get("CUDA_VISIBLE_DEVICES")
        wanted = rank if gpu is None else gpu
        gpus = [str(i) for i in range(wanted + 1)] if visible is None else visible.split(",")
        index = 0 if shared else wanted
        if index >= len(gpus):
            raise ValueError(f"CUDA_VISIBLE_DEVICES: found {visible!r}, expected a GPU for rank {rank}")
        env["CUDA_VISIBLE_DEVICES"] = gpus[index]
        if shared:
            env |= {
                "NCCL_HOSTID": f"host{rank}",
                "NCCL_SOCKET_IFNAME": "lo",
                "NCCL_IB_DISABLE": "1",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            }
    env["XLA_FLAGS"] = " ".join(flags)
    return with_packages(env)


def sharing_cores(engines: int, platform: Platform, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for so many engines of one machine. On a CPU each of them would compute with a thread for every core,
    and idle ones spin for a while."""
    if platform != "cpu" or {"NPROC", "PJRT_NPROC"} & environ.keys():
        return dict(environ)
    return {**environ, "PJRT_NPROC": str(max(1, len(os.sched_getaffinity(0)) // engines))}


def with_packages(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with a PYTHONPATH that finds this package where the running process found it."""
    roots: list[str] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        roots.append(str(Path(spec.origin).resolve().parent.parent))
    existing = environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*roots, *filter(None, existing)]))}


def compilation_cache(platform: Platform, directory: str | Path | None, environ: Mapping[str, str]) -> Path:
    """Where compiled programs are kept: `directory`, $MOE_JAX_CACHE, or ~/.cache/moe-jax/xla.

    Programs for a CPU lie in a directory of that kind of CPU: they hold its instructions, which JAX's key leaves out.
    """
    root = Path(directory or environ.get("MOE_JAX_CACHE") or "~/.cache/moe-jax/xla").expanduser()
    return root / f"cpu-{_cpu_kind()}" if platform == "cpu" else root


def _cpu_kind() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join([machine.machine(), *named]).encode()).hexdigest()[:12]
