"""JAX across processes: the coordination service, its clients, and every private JAX name that this project uses.

Private names and where they were seen: `jax._src.distributed.global_state` and `jax._src.lib._jax` (0.10.2, 0.11.2,
0.12.0), `jax._src.xla_bridge.backends_are_initialized` (the same), `jax._src.cache_key._hash_accelerator_config` and
`_hash_devices` (0.10.2, 0.11.2).
"""

import os
import warnings
from typing import Any

import jax
from jax._src import cache_key, distributed, xla_bridge
from jax._src.lib import _jax  # type: ignore[attr-defined]

# Same bits for every batch: products on one thread, so that their summation order does not depend on the machine; and
# sums in XLA's own loops, in order, where XLA would hand them to a library that chooses an order by shape.
_CPU_FLAGS = {"xla_cpu_multi_thread_eigen": "false", "xla_cpu_experimental_ynn_fusion_type": "individual_dot"}


def set_cpu_devices(count: int) -> None:
    """Before JAX is first used: `count` virtual devices if it runs on CPU, and the flags that deterministic mode needs.

    Afterwards nothing can be changed: warns if the flags are missing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={value}" for name, value in _CPU_FLAGS.items() if name not in flags]
    if xla_bridge.backends_are_initialized():
        if missing and jax.default_backend() == "cpu":
            warnings.warn(
                "JAX was used before moe_jax could set its flags, so a request's bits may depend on its batch. "
                f"Make the LLM first, or set XLA_FLAGS={' '.join(missing)!r}",
                stacklevel=2,
            )
        return
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)


def start_service(address: str, num_nodes: int, heartbeat_s: int = 30) -> Any:
    """The JAX coordination service, in this process, at "host:port", for `num_nodes` ranks. Keep the result.

    The heartbeat timeout is long because detection is ours, and a short one aborts every worker when the service is
    merely stopped.
    """
    return _jax.get_distributed_runtime_service(
        address, num_nodes, heartbeat_timeout=heartbeat_s, shutdown_timeout=5, recoverable=True
    )


def connect(address: str, rank: int, num_nodes: int, init_timeout_s: int = 120, heartbeat_s: int = 30) -> Any:
    """Join the service as `rank`, before this process's first use of JAX devices. Returns the client."""
    if xla_bridge.backends_are_initialized():
        raise RuntimeError("distributed.connect: JAX devices are in use already, expected to be called before")
    set_cpu_devices(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    state = distributed.global_state
    state.process_id, state.num_processes, state.coordinator_address = rank, num_nodes, address
    client = _jax.get_distributed_runtime_client(
        address,
        rank,
        init_timeout=init_timeout_s,
        use_compression=True,
        heartbeat_timeout=heartbeat_s,
        shutdown_on_destruction=False,
    )
    client.connect()
    state.client = client
    return client


def live_nodes(client: Any, ranks: list[int]) -> list[int]:
    """A barrier among the live of `ranks`; it also tells XLA their incarnations. To be called at every epoch."""
    return sorted(client.get_live_nodes(sorted(ranks)))


def keep_programs(directory: str, share: bool, timeout_s: float) -> None:
    """Keep compiled programs in `directory`, where only rank 0 of a program of several ranks writes.

    With `share`, rank 0 compiles what is missing and the others, for up to `timeout_s`, wait for it. That needs all
    ranks to find the same entries: nobody else may add any in the meantime. Without it they compile at the same time,
    and on CPU the first one done gives up on the last after 30 s (Gloo).
    """
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if share:
        # On CPU the devices' topology, as each process sees it, is part of the key: no two ranks would agree on one.
        cache_key._hash_accelerator_config = cache_key._hash_devices
        jax.config.update("jax_share_binary_between_hosts", True)
        jax.config.update("jax_share_binary_between_hosts_timeout_ms", int(timeout_s * 1000))
