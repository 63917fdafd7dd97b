"""What `moe-jax serve` was asked to do. Imports nothing heavy: the process that keeps a coordinator needs no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serving.environment import Platform
from serving.tls import Tls


@dataclass(frozen=True)
class Options:
    model: Path
    address: str  # host:port; port 0: any
    platform: Platform
    hosts: int = 1
    ranks_per_host: int = 1
    load_format: str = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)  # fields of EngineConfig
    workers: bool = True  # start them here; else they come from other machines
    restart: bool = True
    tls: Tls | None = None
    api_keys: Path | None = None
    cluster_token: str | None = None
    rebalance_above: float = 1.25  # imbalance; 0: never by itself
    max_queue_tokens: int | None = None  # of all open requests; None: four times what the caches hold
    max_queue_seconds: float = 10.0  # that a new request may have to wait for its turn
    max_output_tokens: int | None = None  # of one request; None: as many as fit
    web: str | None = None  # host:port of status page and metrics
    openai_port: int | None = None  # of the gateway
    otlp: str | None = None  # endpoint of a collector, for traces
    log_json: bool = False
    grace: float = 20.0  # seconds in which a signal to end lets accepted requests finish
    journal: Path | None = None  # directories, made if need be
    log_dir: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Options:
        paths = ("model", "journal", "log_dir", "api_keys")
        options: dict[str, Any] = {n: Path(v) if n in paths and v is not None else v for n, v in given.items()}
        if tls := options.pop("tls"):
            files: dict[str, Any] = {name: Path(v) if isinstance(v, str) else v for name, v in tls.items()}
            options["tls"] = Tls(**files)
        return cls(**options)
