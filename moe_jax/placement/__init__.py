"""Which slots hold which experts: plans, routing tables, repairs after a loss, and what a placement survives.

Pure functions over numpy; no JAX, no I/O, nothing random that a second call would not repeat. A placement is an int32
array [layers, ranks, slots] of logical experts, -1 where a slot is empty or its rank is gone. `hosts` names the failure
domain of every rank, in the order of the placement's rows.

The promise: with replication r every expert has replicas on at least r hosts, so any r - 1 lost hosts leave every
expert alive. Load decides how many replicas beyond the promise an expert gets, never whether it keeps it.
"""

from moe_jax.placement.board import replicas
from moe_jax.placement.eplb import eplb
from moe_jax.placement.loads import LOADS, make_load, read_load
from moe_jax.placement.measures import (
    fatal_probability,
    imbalance,
    imbalance_bound,
    missing,
    moves,
    survivable_host_losses,
)
from moe_jax.placement.planning import choose_scatter, plan, rebalance
from moe_jax.placement.repairing import part, repair, restore
from moe_jax.placement.report import Changes, LossReport, Report, changes, report
from moe_jax.placement.tables import primaries, routing

__all__ = [
    "LOADS",
    "Changes",
    "LossReport",
    "Report",
    "changes",
    "choose_scatter",
    "eplb",
    "fatal_probability",
    "imbalance",
    "imbalance_bound",
    "make_load",
    "missing",
    "moves",
    "part",
    "plan",
    "primaries",
    "read_load",
    "rebalance",
    "repair",
    "replicas",
    "report",
    "restore",
    "routing",
    "survivable_host_losses",
]
