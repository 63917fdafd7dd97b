"""Experts follow their load: engines count tokens, here they are asked for them, and when the most loaded rank has too
much of them replicas are moved.

What is promised is kept all the while, few slots change (placement.rebalance), and streams go on: ranks fetch weights
beside their steps and put a part of them in place between two, which is an epoch of its own (Rules.part).
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax import placement
from serving.expert_loads import ExpertLoads

if TYPE_CHECKING:
    from serving.coordinator import Coordinator
    from serving.epoch import Epoch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """When experts are moved. Imbalance: the most loaded rank over the mean, averaged over layers."""

    above: float = 1.25  # imbalance that is changed; 0: none by itself
    within: float = 1.1  # that a layer may keep then
    gain: float = 0.05  # of imbalance, that a change must bring
    enough: float = 100.0  # tokens of an expert in the mean, before anything is concluded
    half_life: float = 300.0  # seconds
    every: float = 10.0  # seconds between two looks
    rest: float = 60.0  # seconds after a change until the next


class Rebalancing:
    """Belongs to the coordinator, and to its event loop."""

    def __init__(self, coordinator: Coordinator, policy: Policy) -> None:
        self.policy, self._coordinator = policy, coordinator
        self.loads = ExpertLoads(policy.half_life)
        self.changes = 0  # made, by itself or because it was asked to
        self._changed: float | None = None  # when the last change by itself had been made
        self._task: asyncio.Task[None] | None = None
        self._seen: Any = None  # tokens that had been sent when loads were asked for last
        self._imbalance: tuple[Any, float | None] = None, None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.policy.every)
            try:
                await self.look()
            except (RuntimeError, LookupError) as e:  # ranks come and go meanwhile
                log.info("experts stay where they are: %s", e)

    async def look(self) -> bool:
        """Whether experts were moved, because it was worth it. Raises as Coordinator.move."""
        await self.gather()
        policy, load = self.policy, self.loads.known(self.policy.enough)
        resting = self._changed is not None and time.monotonic() - self._changed < policy.rest
        if load is None or resting or not policy.above:
            return False
        epoch = self._coordinator.placement
        before = self._of(epoch.slots, epoch, load)
        if before <= policy.above:
            return False
        goal = await self._better(epoch, load, policy.within)
        after = self._of(goal, epoch, load)
        if after > before - policy.gain:
            return False
        moved = placement.moves(epoch.slots, goal)
        log.info("imbalance %.3f: %d slots change, after which it is %.3f", before, moved, after)
        await self._move(epoch, goal)
        self._changed = time.monotonic()
        return True

    async def gather(self) -> None:
        """Ask the engines for what they have counted, unless they have had no work since."""
        counts = self._coordinator.router.ledger.counts
        done = counts.tokens, counts.prompt_tokens
        if done != self._seen:
            self._seen = done
            with suppress(TimeoutError):  # they are being lost
                await self._coordinator.ask({"type": "loads"})

    def imbalance(self, epoch: Epoch) -> float | None:
        """By the measured load; None while too little was measured."""
        at = epoch.number, self.loads.version
        if self._imbalance[0] != at:
            load = self.loads.known(self.policy.enough)
            self._imbalance = at, None if load is None else round(self._of(epoch.slots, epoch, load), 4)
        return self._imbalance[1]

    def _of(self, slots: np.ndarray, epoch: Epoch, load: np.ndarray) -> float:
        return placement.imbalance(slots, epoch.order, load, load.shape[1])

    async def rebalance(self) -> dict[str, Any]:
        """{"slots": that change, "epoch": the first in which all have}. Raises as Coordinator.move."""
        await self.gather()
        epoch = self._coordinator.placement
        goal = await self._better(epoch, self.loads.known(self.policy.enough), 1.0)
        slots = placement.moves(epoch.slots, goal)
        if slots:
            await self._move(epoch, goal)
        return {"slots": slots, "epoch": self._coordinator.epoch}

    async def _better(self, epoch: Epoch, load: np.ndarray | None, within: float) -> np.ndarray:
        """In a thread: with hundreds of ranks it takes a second."""
        rebalance = self._coordinator.cluster.rebalance
        return await asyncio.to_thread(rebalance, epoch.slots, sorted(epoch.order), load, within)

    async def _move(self, epoch: Epoch, goal: np.ndarray) -> None:
        await self._coordinator.move(epoch.number, goal)
        self.changes += 1
