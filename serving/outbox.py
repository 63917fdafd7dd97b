"""What an engine process has to say, sent by a thread of its own.

A parent that stands still for a while (a debugger, Ctrl-Z, a script that does not poll) lets the channel fill up. The
engine must not stand still with it: the other ranks wait for it in a collective. What queues up here is bounded by the
tokens of the accepted requests.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from serving.channel import Channel


class Outbox:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="outbox", daemon=True).start()

    def send(self, body: dict[str, Any], data: bytes = b"") -> None:
        """As Channel.send, but never blocks. A channel that is gone ends the process by way of the inbox."""
        self._waiting.put((body, data))

    def _run(self) -> None:
        while True:
            body, data = self._waiting.get()
            try:
                self._channel.send(body, data)
            except OSError:
                return
