"""What a child process is told, received by a thread of its own; and the child's promise to end with its parent.

The main thread may be inside a compilation or a collective for any length of time. The thread here still hears the
channel close, and ends the process at once, without asking it: nothing in it is worth more than leaving no orphan.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable

from serving.channel import Channel, ChannelClosed, Message

MAX_LOG = 4 << 20  # bytes
_TICK = 1.0  # seconds


class Inbox:
    """Commands in the order of their arrival. Starts listening at once."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._parent = channel, os.getppid()
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.urgent: Callable[[Message], None] | None = None  # called in the listening thread before a message queues
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def take(self, wait: bool) -> list[Message]:
        """All commands that have arrived; with `wait`, blocks until there is one."""
        messages = [self._queue.get()] if wait else []
        try:
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return messages

    def _listen(self) -> None:
        try:
            while True:
                if select.select([self._channel], [], [], _TICK)[0]:
                    for message in self._channel.receive():
                        if self.urgent is not None:
                            self.urgent(message)
                        self._queue.put(message)
                elif os.getppid() != self._parent:
                    break  # a fork of the parent may still hold the other end open
                bound_log()
        except ChannelClosed:
            pass
        finally:
            os._exit(0)


def bound_log() -> None:
    """Start the log again when it has grown too long. It is opened for appending, so that works at any time."""
    try:
        if os.fstat(2).st_size > MAX_LOG:
            os.ftruncate(2, 0)
    except OSError:
        pass  # a terminal
