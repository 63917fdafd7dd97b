"""How a coordinator goes on where another one died: it finds the JAX service and the workers of the last epoch, and
asks their engines where they stand.

What is known of the other one is in the journal. Workers and engines keep their weights and wait, but for a bounded
time, and so does this: whoever has not answered in time is lost, as if it had been lost at any other moment. Requests
need no finding. They are in the journal with all their tokens, and are given out again under new numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.epoch import Epoch

GRACE = 5.0  # seconds for the workers to come: they try twice a second
ANSWER = 2.0  # seconds from the first answer, for the others


@dataclass
class Takeover:
    epoch: Epoch  # the last that was persisted
    nodes: tuple[int, ...]  # ranks, of its generation
    lost: set[int]  # incarnations that were being fenced, or whose worker is a new one
    begun: float  # time.monotonic()
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)  # by rank, of its engine
    first: float | None = None  # when the first one came

    def expects(self, rank: int, incarnation: int) -> bool:
        """Whether this worker belongs to the epoch."""
        pairs = zip(self.epoch.order, self.epoch.incarnations, strict=True)
        return (rank, incarnation) in pairs and incarnation not in self.lost

    def answered(self, rank: int, answer: dict[str, Any], now: float) -> None:
        self.answers[rank] = answer
        self.first = self.first or now

    def replaced(self, rank: int) -> None:
        """A new worker came for this rank: the one of the epoch is no more."""
        self.lost |= {i for r, i in zip(self.epoch.order, self.epoch.incarnations, strict=True) if r == rank}

    def gone(self, rank: int) -> None:
        self.answers.pop(rank, None)

    def over(self, now: float) -> bool:
        """Whether there is nobody left to wait for."""
        late = now - self.begun > GRACE or (self.first is not None and now - self.first > ANSWER)
        return late or len(self.answers) == len(set(self.epoch.incarnations) - self.lost)

    @property
    def entered(self) -> dict[int, int]:
        """As Membership.take_over wants it."""
        return {rank: answer["epoch"] for rank, answer in self.answers.items()}
