"""Engines do not last for ever: each new mesh leaves sockets and threads of Gloo behind in them, and an order of ranks
that can be used again only by other engines.

So before that matters they are replaced, a host at a time, by way of a drain. Somebody must start workers again.
"""

from __future__ import annotations

import asyncio
import logging

from serving.coordinator import Coordinator, Unavailable

EPOCHS = 48  # that an engine is in; each costs it a socket for every other rank
_LOOK = 1.0  # seconds
_DRAIN = 30.0  # seconds: a drain that takes longer has been overtaken by events

log = logging.getLogger(__name__)


async def recycle(coordinator: Coordinator, epochs: int = EPOCHS) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(_LOOK)
        host = coordinator.worn_host(epochs)
        if host is None:
            continue
        log.info("host %s: its engines are replaced, before sockets or orders of ranks run out", host)
        try:
            await asyncio.wait_for(coordinator.drain(host, away=False), _DRAIN)
        except (Unavailable, TimeoutError) as e:
            log.info("host %s: not now: %s", host, e)
