"""How long each change of membership took, and what of it a client saw. Pure bookkeeping: time is an argument.

Phases, in milliseconds (seconds of time.monotonic go in):

    detect_ms   from the first evidence to the fence. Where heartbeats went missing, from the last sign of life
    fence_ms    until the JAX service has shut the last lost rank out
    agree_ms    until the epoch was announced, and what the engines' own first agreement took
    fail_ms, load_ms, compile_ms, rebuild_ms, first_step_ms   in the engines, of the slowest rank; fail: until XLA gave
                up; the first step makes the communicator if none was built ahead, and prefills what lost its rank
    resume_ms   from the last acknowledgement to the first token
    pause_ms    the longest gap between two tokens of any stream, across all of it; None if there was no stream
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serving import membership

_KEPT = 512  # records
_RANKS_CHANGE = ("loss", "join", "drain")
_ENGINE = ("agree", "fail", "load", "compile", "rebuild", "first_step")


@dataclass(eq=False)
class Recovery:
    """One announced epoch, and what followed."""

    made: membership.Recovery  # how it came to be
    evidence: float
    fence: float | None  # when it was sent
    announced: float
    left: list[int]  # drained ranks
    served: float | None = None
    resumed: float | None = None
    gap: float | None = None
    engine: dict[str, float] = field(default_factory=dict)  # milliseconds, of the slowest rank
    waiting: set[int] = field(default_factory=set)  # streams that have not gone on since

    def published(self, key: int, last: float | None, now: float) -> None:
        if last is not None and (key in self.waiting or self.served is None):
            self.gap = max(self.gap or 0.0, now - last)
        if self.served is not None:
            self.waiting.discard(key)
            if self.resumed is None:
                self.resumed = now

    def as_dict(self) -> dict[str, Any]:
        fence = self.evidence if self.fence is None else self.fence
        fenced = fence if self.made.fenced is None else max(fence, self.made.fenced)
        engine = dict.fromkeys(_ENGINE, 0.0) | self.engine
        agree = engine.pop("agree") + _ms(max(0.0, self.announced - fenced))
        resume = None if self.served is None or self.resumed is None else _ms(self.resumed - self.served)
        return {
            "epoch": self.made.epoch,
            "cause": self.made.cause,
            "reasons": list(self.made.reasons),
            "lost": sorted({*self.made.lost, *self.left}),
            "joined": sorted(self.made.joined),
            "detect_ms": _ms(fence - self.evidence),
            "fence_ms": _ms(fenced - fence),
            "agree_ms": round(agree, 3),
            **{f"{name}_ms": round(value, 3) for name, value in engine.items()},
            "resume_ms": resume,
            "pause_ms": None if self.gap is None else _ms(self.gap),
        }


class Recoveries:
    """All of them, the last few hundred in full."""

    def __init__(self) -> None:
        self._records: deque[Recovery] = deque(maxlen=_KEPT)
        self._open: list[Recovery] = []  # those across which streams still wait
        self._fence: tuple[float, float] | None = None  # (since when the rank was lost, when the fence was sent)
        self._last: dict[int, float] = {}  # when a stream's last token was published

    def fence(self, since: float, now: float) -> None:
        """A rank is being fenced that has been lost `since`."""
        first = self._fence or (since, now)
        self._fence = min(first[0], since), first[1]

    def announced(self, made: membership.Recovery, left: list[int], now: float) -> None:
        """An epoch goes out; `left`: ranks that were drained for it."""
        since, sent = made.began, None
        if self._fence is not None and self._fence[1] >= made.began:  # not that of a joiner which nobody waited for
            since, sent = self._fence
        self._fence = None
        record = Recovery(made, min(since, made.began), sent, now, left, waiting=set(self._last))
        self._records.append(record)
        self._open.append(record)

    def entered(self, epoch: int, ms: Mapping[str, float]) -> None:
        """What a rank says of its own work."""
        for record in self._open:
            if record.made.epoch == epoch:
                for name, value in ms.items():
                    record.engine[name] = max(record.engine.get(name, 0.0), value)

    def serving(self, now: float) -> None:
        """All ranks of the last epoch have acknowledged it; one before it may have been passed over."""
        for record in self._open:
            if record.served is None:
                record.served = now
        self._close()

    def published(self, key: int, now: float) -> None:
        """A token of stream `key` goes to its client."""
        last = self._last.get(key)
        self._last[key] = now
        if self._open:
            for record in self._open:
                record.published(key, last, now)
            self._close()

    def ended(self, key: int) -> None:
        """Nothing more comes of this stream."""
        self._last.pop(key, None)
        for record in self._open:
            record.waiting.discard(key)
        self._close()

    def _close(self) -> None:
        self._open = [r for r in self._open if r.served is None or r.waiting]

    def changes(self) -> list[dict[str, Any]]:
        """Changes of the ranks that serve, oldest first: `recoveries` of the status."""
        return [r.as_dict() for r in self._records if r.made.cause in _RANKS_CHANGE]

    def closed(self) -> list[dict[str, Any]]:
        """Those of `changes` of which nothing more will be known."""
        return [r.as_dict() for r in self._records if r.made.cause in _RANKS_CHANGE and r not in self._open]

    def switches(self) -> list[dict[str, Any]]:
        """The other epochs: the first, and those in which only the placement of experts changed."""
        return [r.as_dict() for r in self._records if r.made.cause not in _RANKS_CHANGE]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
