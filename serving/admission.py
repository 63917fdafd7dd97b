"""Whose turn it is, and where: the order in which waiting requests are given to ranks, and which rank suits one best.

Pure decisions; no I/O, no time. The order is start-time fair queueing (Goyal, Vin and Cheng, 1996): each owner's
requests carry tags of a virtual time, an owner's next tag lies its cost over its weight behind its last one, and the
least tag goes first. So an owner that floods the queue delays itself, and one that asks for little waits for at most
one request of each of the others. Priorities come before that, and what has lost its place comes before all.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)

MAX_PRIORITY = 9
_COMPACT = 64  # removed items that are worth a new heap
_GAPS = 128  # ends of requests that a pace is made of; those of a batch may come at once
_FIRST_GAP = 0.2  # seconds, where nothing is known yet
_LONGEST_GAP = 10.0


@dataclass(frozen=True)
class Owner:
    """Who asks, and what may be open of theirs at once."""

    name: str = ""
    weight: float = 1.0
    max_requests: int = 1 << 62
    max_tokens: int = 1 << 62


class _Item(NamedTuple):
    rank: tuple[float, float, int]  # class, tag, number of arrival
    start: float  # its tag in virtual time
    owner: str


class FairQueue(Generic[T]):
    """Items that wait. Each is here once at most."""

    def __init__(self) -> None:
        self._items: dict[T, _Item] = {}
        self._heap: list[tuple[tuple[float, float, int], T]] = []
        self._now = 0.0  # virtual time
        self._last: dict[str, float] = {}  # by owner: where its next tag begins
        self._counts: dict[float, Counter[str]] = {}  # of items, by class and owner
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def push(self, item: T, owner: Owner, cost: float, priority: int = 0) -> None:
        """cost: above 0, in whatever unit all costs are in."""
        start = max(self._now, self._last.get(owner.name, 0.0))
        self._last[owner.name] = start + cost / owner.weight
        self._put(item, (float(MAX_PRIORITY - priority), start), start, owner.name)

    def push_back(self, item: T, order: float) -> None:
        """One that has been popped before: it goes first, among its like by `order`, and has paid already."""
        self._put(item, (-1.0, order), self._now, "")

    def ahead(self, owner: Owner, priority: int = 0) -> int:
        """How many would have their turn before a new one of this owner, if all owners had the same weight."""
        before = sum(counts.total() for class_, counts in self._counts.items() if class_ < MAX_PRIORITY - priority)
        same = self._counts.get(float(MAX_PRIORITY - priority), Counter())
        others = len(same) - (owner.name in same)
        return before + min(same.total(), same[owner.name] * (1 + others) + others)

    def _put(self, item: T, rank: tuple[float, float], start: float, owner: str) -> None:
        if item in self._items:
            raise ValueError(f"push: found {item!r}, which waits already")
        self._arrivals += 1
        self._items[item] = _Item((*rank, self._arrivals), start, owner)
        self._counts.setdefault(rank[0], Counter())[owner] += 1
        heapq.heappush(self._heap, (self._items[item].rank, item))

    def pop(self) -> T | None:
        """The next one; None if nothing waits."""
        while self._heap:
            rank, item = heapq.heappop(self._heap)
            found = self._items.get(item)
            if found is not None and found.rank == rank:
                self._take_out(item)
                self._now = max(self._now, found.start)
                if not self._items:  # nobody waits: nobody has an advantage to keep
                    self._last.clear()
                    self._heap.clear()
                return item
        return None

    def remove(self, item: T) -> None:
        """It waits no longer."""
        self._take_out(item)
        if len(self._heap) > 2 * len(self._items) + _COMPACT:
            self._heap = [(found.rank, item) for item, found in self._items.items()]
            heapq.heapify(self._heap)

    def _take_out(self, item: T) -> None:
        found = self._items.pop(item)
        counts = self._counts[found.rank[0]]
        counts[found.owner] -= 1
        if not counts[found.owner]:
            del counts[found.owner]


class Pace:
    """How long something will have to wait, as far as can be said by how fast requests have ended lately. Times are
    seconds; only those count in which there was something to do."""

    def __init__(self) -> None:
        self._gaps = deque([_FIRST_GAP], maxlen=_GAPS)  # between two ends
        self._last = 0.0  # when one ended, or the first came to where there was none

    def began(self, now: float) -> None:
        """There is something to do again."""
        self._last = now

    def ended(self, now: float) -> None:
        """A request."""
        self._gaps.append(min(now - self._last, _LONGEST_GAP))
        self._last = now

    def wait(self, ahead: int) -> float:
        """For one that has so many ahead of it."""
        return ahead * sum(self._gaps) / len(self._gaps)


class Prefixes:
    """Beginnings of prompts that a rank has had lately: its cache may still hold them. An estimate, and not a promise.

    capacity: blocks that are remembered.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def note(self, hashes: Sequence[int]) -> None:
        for value in hashes:
            self._known[value] = None
            self._known.move_to_end(value)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def matched(self, hashes: Sequence[int]) -> int:
        """Blocks at the beginning that are known."""
        for count, value in enumerate(hashes):
            if value not in self._known:
                return count
        return len(hashes)


def block_hashes(tokens: Sequence[int], block: int, most: int = 64) -> list[int]:
    """Of each whole block and all before it, the first `most` of them."""
    hashes, value = [], 0
    for start in range(0, min(len(tokens) // block, most) * block, block):
        value = hash((value, *tokens[start : start + block]))
        hashes.append(value)
    return hashes
