"""What waits to be written to a gRPC stream: control messages and channel frames, in order.

Frames that follow each other travel together: a burst of small ones costs one gRPC message.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")

_JOIN = 1 << 18  # bytes of frames in one gRPC message, unless a single one is longer


class Outgoing(Generic[Message]):
    """Belongs to one event loop."""

    def __init__(self, wrap: Callable[[bytes], Message]) -> None:
        """`wrap` makes a message of one or several frames."""
        self._wrap = wrap
        self._items: deque[Message | bytes] = deque()
        self._wake = asyncio.Event()
        self.waiting = 0  # bytes of frames that are not yet written

    def put(self, message: Message) -> None:
        self._items.append(message)
        self._wake.set()

    def put_frames(self, data: bytes) -> None:
        """`data`: one or several whole frames."""
        self._items.append(data)
        self.waiting += len(data)
        self._wake.set()

    def clear(self) -> None:
        self._items.clear()
        self.waiting = 0

    async def run(self, write: Callable[[Message], Awaitable[None]]) -> None:
        """Write what comes until cancelled, or until `write` raises. It may block while the other end is behind."""
        while True:
            self._wake.clear()
            while self._items:
                item = self._items.popleft()
                await write(self._wrap(self._join(item)) if isinstance(item, bytes) else item)
            await self._wake.wait()

    def _join(self, first: bytes) -> bytes:
        parts, size = [first], len(first)
        while self._items and isinstance(self._items[0], bytes) and size + len(self._items[0]) <= _JOIN:
            parts.append(self._items.popleft())  # type: ignore[arg-type]
            size += len(parts[-1])
        self.waiting -= size
        return b"".join(parts) if len(parts) > 1 else first
