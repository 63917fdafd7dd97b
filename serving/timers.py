"""One table of all that is waited for."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any


class Timers:
    """What is waited for, and until when. Keys are (kind, *which). A thousand may run, and most are started again
    before they end: the heap keeps the old ends until they have passed."""

    def __init__(self) -> None:
        self._waits: dict[str, dict[tuple[Any, ...], tuple[float, float, int]]] = {}  # → (deadline, seconds, number)
        self._ends: list[tuple[float, float, int, tuple[Any, ...]]] = []  # a heap; numbers tell what is still meant
        self._number = 0

    def start(self, seconds: float, now: float, *key: Any) -> None:
        self._number += 1
        wait = now + seconds, seconds, self._number
        self._waits.setdefault(key[0], {})[key] = wait
        heapq.heappush(self._ends, (*wait, key))

    def running(self, kind: str, *which: Any) -> bool:
        waits, prefix = self._waits.get(kind, {}), (kind, *which)
        return bool(waits) and (not which or prefix in waits or any(key[: len(prefix)] == prefix for key in waits))

    def stop(self, kind: str, *which: Any) -> None:
        waits, prefix = self._waits.get(kind, {}), (kind, *which)
        if waits.pop(prefix, None) is None and waits:
            self._waits[kind] = {key: wait for key, wait in waits.items() if key[: len(prefix)] != prefix}

    def keep(self, *kinds: str) -> None:
        self._waits = {kind: waits for kind, waits in self._waits.items() if kind in kinds}

    def expired(self, now: float) -> Iterator[tuple[Any, ...]]:
        """Take out what has ended, earliest first. Timers may be started and stopped meanwhile."""
        while self.due <= now:
            key = heapq.heappop(self._ends)[3]
            del self._waits[key[0]][key]
            yield key

    def restart(self, now: float) -> None:
        for key, (_, seconds, _) in [item for waits in self._waits.values() for item in waits.items()]:
            self.start(seconds, now, *key)

    @property
    def due(self) -> float:
        while self._ends:
            deadline, _, number, key = self._ends[0]
            if self._waits.get(key[0], {}).get(key, (0.0, 0.0, 0))[2] == number:
                return deadline
            heapq.heappop(self._ends)
        return float("inf")
