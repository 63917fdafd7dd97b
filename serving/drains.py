"""The hosts that are leaving: which of their engines are still there, who waits for them to have left, and what of that
the next coordinator must know. Who may leave is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

_NAME = "draining"  # in the journal


class Drains:
    """Belongs to the running event loop."""

    def __init__(self, get: Callable[[str], Any], put: Callable[[str, Any], None]) -> None:
        """get, put: values of the journal, by name."""
        self._put = put
        self._leaving: dict[str, set[int]] = {}  # incarnations, by host
        self._left: dict[str, asyncio.Future[None]] = {}
        self._kept: list[str] = get(_NAME) or []  # hosts, in the journal

    def __contains__(self, host: str) -> bool:
        return host in self._left

    @property
    def kept(self) -> list[str]:
        """Hosts that another coordinator was draining, before `begin` and `forget`."""
        return list(self._kept)

    def begin(self, host: str, incarnations: Collection[int], keep: bool) -> None:
        """keep: another coordinator shall go on with it."""
        self._leaving[host], self._left[host] = set(incarnations), asyncio.get_running_loop().create_future()
        if keep and host not in self._kept:
            self._keep([*self._kept, host])

    async def left(self, host: str) -> None:
        """Until it has, if it is leaving; raises what `drop` was told. Whoever is cancelled changes nothing."""
        if host in self._left:
            await asyncio.shield(self._left[host])

    def gone(self, incarnation: int) -> None:
        """This engine has been dismissed."""
        for host, incarnations in list(self._leaving.items()):
            incarnations.discard(incarnation)
            if not incarnations:
                self._end(host).set_result(None)

    def drop(self, error: Exception) -> None:
        """None of them may leave any more."""
        for host in list(self._leaving):
            self._end(host).set_exception(error)

    def forget(self, *hosts: str) -> None:
        """The next coordinator has nothing to do with them."""
        if not {*hosts}.isdisjoint(self._kept):
            self._keep([name for name in self._kept if name not in hosts])

    def _end(self, host: str) -> asyncio.Future[None]:
        del self._leaving[host]
        self.forget(host)
        left = self._left.pop(host)
        left.add_done_callback(lambda left: left.exception())  # whether or not anybody waits
        return left

    def _keep(self, hosts: list[str]) -> None:
        self._kept = hosts
        self._put(_NAME, hosts)
