"""What a coordinator tells of its cluster: the object of `moe-jax status --json`, of the status page and of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import placement
from serving.cluster import Cluster, sizes_after
from serving.ledger import Ledger, Place
from serving.membership import Membership
from serving.recoveries import Recoveries
from serving.worker_stream import WorkerStream


def describe(
    cluster: Cluster,
    membership: Membership,
    ledger: Ledger,
    recoveries: Recoveries,
    streams: Mapping[int, WorkerStream],
    slots: bool,
) -> dict[str, Any]:
    """streams: of the ranks that are connected. slots: with what each slot holds."""
    status, hosts, epoch = membership.status(), cluster.rules.hosts, membership.epoch
    for rank in status["ranks"]:
        rank |= _rank(None if rank["state"] == "lost" else streams.get(rank["rank"]), ledger)
    live = [rank["rank"] for rank in status["ranks"] if rank["state"] == "live"]
    ready = [set(ready_sizes(streams[rank])) for rank in live if rank in streams]
    return {
        **status,
        "experts": None if epoch is None else _experts(epoch.slots, live, hosts, cluster.num_experts),
        "survivable_without_compiling": ready_for([hosts[rank] for rank in live], ready),
        "recoveries": recoveries.changes(),
        "switches": recoveries.switches(),
        "requests": {"open": len(ledger), "waiting": ledger.waiting, **vars(ledger.counts)},
        **({"slots": [] if epoch is None else epoch.slots.tolist()} if slots else {}),
    }


def _rank(stream: WorkerStream | None, ledger: Ledger) -> dict[str, Any]:
    if stream is None:
        unknown = ("pid", "supervisor_pid", "device", "compilations", "kv_cache_usage")
        return {**dict.fromkeys(unknown), "requests": 0, "programs": []}
    return {
        "pid": stream.engine_pid,
        "supervisor_pid": stream.pid,
        "device": stream.device,
        "compilations": stream.compiled,  # since its engine was started
        "kv_cache_usage": None if stream.usage is None else round(stream.usage, 4),
        "requests": ledger.load(Place(stream.rank, stream.incarnation)).jobs,
        "programs": ready_sizes(stream),
    }


def ready_sizes(stream: WorkerStream) -> list[int]:
    """Sizes of meshes whose programs its engine has at hand."""
    return stream.answers.get("programs", {}).get("sizes", [])


def ready_for(hosts: Sequence[str], sizes: Sequence[set[int]]) -> int:
    """How many hosts may be lost, whichever they are, with every program that goes on at hand.

    hosts: the label of each live rank. sizes: of the meshes that each has programs for.
    """
    ready = set.intersection(*sizes) if sizes else set()
    lost = 0
    while (left := sizes_after(hosts, lost + 1)) and left <= ready:
        lost += 1
    return lost


def _experts(slots: np.ndarray, live: list[int], hosts: Sequence[str], num_experts: int) -> dict[str, Any]:
    slots = slots[:, live]
    count = placement.replicas(slots, num_experts)
    return {
        "logical": int(count.size),
        "slots": slots.shape[1] * slots.shape[2],
        "missing": int((count == 0).sum()),
        "min_replicas": int(count.min()) if count.size else 0,
        "survivable_host_losses": placement.survivable_host_losses(slots, [hosts[r] for r in live], num_experts),
    }
