"""The engine in this process: what `LLM` uses with one host."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import Checkpoint, open_checkpoint
from moe_jax.config import ConfigError, EngineConfig
from moe_jax.distributed import set_cpu_devices
from moe_jax.engine import Engine
from moe_jax.executables import Executables, resolve
from moe_jax.llm import engine_config
from moe_jax.placement import plan
from moe_jax.programs import ProgramStore
from moe_jax.request import Request, TokenEvent


def device_kind(device: jax.Device) -> str:
    """What programs are kept by: "cpu" or a GPU's name."""
    return device.platform if device.platform == "cpu" else device.device_kind


def local_engine(
    checkpoint: Checkpoint, config: EngineConfig, devices: Sequence[jax.Device], store: ProgramStore
) -> Engine:
    """An engine whose mesh is all this process's own."""
    model = checkpoint.config
    hosts = [f"rank{i}" for i in range(len(devices))]
    count = config.slots_for(model.num_experts)
    slots = plan(model.num_moe_layers, model.num_experts, hosts, count, config.replication)
    programs = Executables.of(checkpoint, config, device_kind(devices[0]), store)
    engine = Engine(checkpoint, config, devices, slots, programs)
    engine.enter(1, engine.own, slots)
    return engine


class LocalBackend:
    """All ranks in this process, one local device each."""

    def __init__(
        self, path: Path, ranks: int, load_format: Any, options: dict[str, Any], store: ProgramStore | None = None
    ) -> None:
        """store: where compiled programs are kept."""
        store = store or ProgramStore(None)
        checkpoint = open_checkpoint(path, load_format)
        set_cpu_devices(ranks)
        if len(jax.devices()) < ranks:
            raise ConfigError(
                f"ranks_per_host: found {ranks}, expected at most this process's {len(jax.devices())} devices "
                "(on CPU more can be had only before JAX is first used)"
            )
        device = jax.devices()[0]
        # Which kernels run decides whether 8-bit experts stay so, and with them how much memory is left.
        asked = engine_config(checkpoint.config, ranks, device.platform, **options)
        checkpoint, _ = resolve(checkpoint, asked, device_kind(device))
        memory = (device.memory_stats() or {}).get("bytes_limit")
        config = engine_config(checkpoint.config, ranks, device.platform, memory, **options)
        self.model, self.config = checkpoint.config, config
        self.engine: Engine | None = local_engine(checkpoint, config, jax.devices()[:ranks], store)
        self.engine.warm_up()
        self._late: list[TokenEvent] = []  # of a step that had to be finished between two polls

    @property
    def _open(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("this LLM is closed")
        return self.engine

    def submit(self, request: Request) -> None:
        engine = self._open
        loads = [rank.scheduler.stats() for rank in engine.ranks]
        rank = min(range(len(loads)), key=lambda i: loads[i].running + loads[i].waiting)
        engine.add(rank, request)

    def cancel(self, request_id: str) -> None:
        if self.engine is not None:
            self.engine.cancel(request_id)

    def poll(self, timeout: float | None) -> list[TokenEvent]:
        """One step's tokens, if there is work; a step takes as long as it takes. The next one has begun then, and the
        devices work while the caller looks at these."""
        engine = self._open
        events, self._late = self._late, []
        return events + engine.step(ahead=True) if engine.has_work else events

    def score(self, token_ids: Sequence[int], chunk: int | None) -> np.ndarray:
        engine = self._open
        while engine.in_flight:
            self._late += engine.finish()
        if engine.has_work:
            raise RuntimeError("score: found requests being served, expected none; finish or cancel them first")
        job = engine.add_score(0, list(token_ids), chunk)
        try:
            while job.sequence.remaining:
                engine.step()
        finally:
            engine.cancel_score(job)
        return np.concatenate(job.rows)

    def close(self) -> None:
        self.engine = None
