"""Which drains go on, who is told of their end, and what the journal has of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.drains import Drains


def test_from_one_coordinator_to_the_next():
    async def scenario() -> None:
        journal: dict[str, Any] = {}
        drains = Drains(journal.get, journal.__setitem__)
        drains.begin("a", {1, 2}, keep=True)
        drains.begin("b", {3}, keep=False)
        drains.begin("c", {4}, keep=True)
        waiting = asyncio.ensure_future(drains.left("a"))
        impatient = asyncio.ensure_future(drains.left("a"))
        await asyncio.sleep(0)
        impatient.cancel()
        drains.gone(1)
        drains.gone(99)
        await asyncio.sleep(0)
        assert not waiting.done() and "a" in drains and drains.kept == ["a", "c"]
        drains.gone(2)
        await waiting
        await drains.left("a")  # long since
        assert "a" not in drains and journal == {"draining": ["c"]}

        other = Drains(journal.get, journal.__setitem__)
        assert other.kept == ["c"] and "c" not in other
        other.begin("c", {7}, keep=True)
        dropped = asyncio.ensure_future(other.left("c"))
        await asyncio.sleep(0)
        other.drop(RuntimeError("too few slots"))
        with pytest.raises(RuntimeError, match="too few"):
            await dropped
        assert journal == {"draining": []} == {"draining": other.kept}

    asyncio.run(scenario())
