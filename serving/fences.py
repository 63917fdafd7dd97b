"""When the JAX service is asked to shut lost nodes out, and whom its answers are about.

On GPUs not before the survivors have halted: the fence makes XLA abort the communicators that a lost node was in, and
destroy them, whether or not a thread is still handing the device a step that uses them. One that is crashes
(`lockable.h: is_unlocked_`, jax 0.11.2), or waits for half a second. An engine that has heard of the abort hands
nothing over any more, and says so as soon as the step it was at is on the device; that takes some milliseconds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from serving.service_process import ServiceProcess


class Fences:
    def __init__(self, patience: float) -> None:
        """patience: seconds that survivors are given; 0: they are not waited for."""
        self._patience = patience
        self._asked: dict[tuple[int, int], deque[tuple[int, int]]] = {}  # (generation, node): (rank, incarnation)
        self._held: list[tuple[ServiceProcess, int]] = []
        self._busy: dict[int, int] = {}  # incarnations that have not halted: the epoch that is over for them
        self._timer: asyncio.TimerHandle | None = None

    def add(self, service: ServiceProcess, node: int, rank: int, incarnation: int) -> None:
        """It is to be fenced; not before the next `release`."""
        self._asked.setdefault((service.generation, node), deque()).append((rank, incarnation))
        self._held.append((service, node))
        self._busy.pop(incarnation, None)

    def aborted(self, incarnations: Iterable[int], epoch: int) -> None:
        """These have been told that their epoch is over; perhaps, by a collective that failed, before anyone knows who
        is lost."""
        if self._patience:
            self._busy.update(dict.fromkeys(incarnations, epoch))

    def halted(self, incarnation: int, epoch: int) -> None:
        """It hands nothing over any more that belongs to this epoch."""
        if self._busy.get(incarnation, epoch + 1) <= epoch:
            del self._busy[incarnation]
        self.release()

    def release(self) -> None:
        """After all that goes together has been added and aborted."""
        if self._held and not self._busy:
            self._ask()
        elif self._held and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._ask)

    def _ask(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._busy.clear()
        held, self._held = self._held, []
        for service, node in held:
            if service.open:
                service.fence(node)

    def answered(self, generation: int, node: int) -> tuple[int, int]:
        """The rank and incarnation that the service has fenced: it answers in the order it was asked."""
        waiting = self._asked[generation, node]
        fenced = waiting.popleft()
        if not waiting:
            del self._asked[generation, node]
        return fenced

    def forget(self, generation: int) -> None:
        """Its service is no more, and so are the engines that had joined it."""
        self._asked = {key: waiting for key, waiting in self._asked.items() if key[0] != generation}
        self._held = [(service, node) for service, node in self._held if service.generation != generation]
        if not self._held:
            self._busy.clear()
