"""`moe-jax top`: what `status` says, live: ranks, slots as a heat map, tokens per second, the last changes."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_STYLES = {"SERVING": "green", "RECOVERING": "yellow", "UNSERVABLE": "red", "live": "green", "lost": "red"}
_BARS = " ▁▂▃▄▅▆▇█"
_COPIES = ("grey23", "red", "cyan", "green")  # of a slot's expert: none (empty or lost), one, two, more
_SPAN = 60  # looks


class View:
    """Made of one status after the other."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_SPAN)
        self._last: tuple[float, int] | None = None  # when, and tokens until then

    def update(self, status: dict[str, Any], now: float, width: int = 100) -> Group:
        """now: seconds, of a clock that only goes on."""
        tokens = status["requests"]["tokens"]
        if self._last is not None and now > self._last[0]:
            self._rates.append(max(0.0, (tokens - self._last[1]) / (now - self._last[0])))
        self._last = now, tokens
        return Group(self._head(status), self._ranks(status), _slots(status, width), _changes(status))

    def _head(self, status: dict[str, Any]) -> Text:
        requests, experts = status["requests"], status["experts"] or {}
        head = Text()
        head.append(status["state"], f"bold {_STYLES.get(status['state'], 'blue')}")
        head.append(f"  epoch {status['epoch']}  {status['reason']}\n")
        rate = self._rates[-1] if self._rates else 0.0
        most = max([1.0, *self._rates])
        bars = "".join(_BARS[round(r / most * (len(_BARS) - 1))] for r in self._rates)
        head.append(f"{rate:8.0f} tokens/s  ").append(bars + "\n", "green")
        head.append(f"{requests['open']} requests, {requests['waiting']} waiting, {requests['refused']} refused; ")
        head.append(f"{experts.get('missing', '–')} experts missing, ")
        head.append(f"{experts.get('survivable_host_losses', '–')} lost hosts survivable, ")
        head.append(f"imbalance {experts.get('imbalance') or '–'}\n")
        return head

    def _ranks(self, status: dict[str, Any]) -> Table:
        table = Table("rank", "host", "state", "requests", "cache", "pid", "device", box=None, pad_edge=False)
        for rank in status["ranks"]:
            usage = rank["kv_cache_usage"]
            table.add_row(
                str(rank["rank"]),
                rank["host"],
                Text(rank["state"], _STYLES.get(rank["state"], "blue")),
                str(rank["requests"]),
                "–" if usage is None else f"{usage:.0%}",
                str(rank["pid"] or "–"),
                rank["device"] or "–",
            )
        return table


def _slots(status: dict[str, Any], width: int) -> Text:
    """A row for each rank, a column for each slot of as many layers as fit; coloured by copies of its expert."""
    layers, text = status.get("slots") or [], Text("\n")
    live = {rank["rank"] for rank in status["ranks"] if rank["state"] == "live"}
    if not layers:
        return text
    shown = layers[: max(1, (width - 8) // (len(layers[0][0]) + 1))]
    copies = [Counter(e for r, row in enumerate(rows) if r in live for e in row) for rows in shown]
    for rank in range(len(layers[0])):
        text.append(f"{rank:4d}  ")
        for rows, count in zip(shown, copies, strict=True):
            for expert in rows[rank]:
                found = count[expert] if rank in live and expert >= 0 else 0
                text.append("■", _COPIES[min(found, 3)])
            text.append(" ")
        text.append("\n")
    names = zip(("empty", "only copy", "two", "more"), _COPIES, strict=True)
    for name, style in names:
        text.append("■ ", style).append(f"{name}   ", "dim")
    return text.append(f"layers 0 to {len(shown) - 1} of {len(layers)}\n", "dim")


def _changes(status: dict[str, Any]) -> Table:
    phases = ("detect", "fence", "agree", "load", "rebuild", "resume", "pause")
    table = Table("epoch", "cause", "lost", "joined", *(f"{p} ms" for p in phases), box=None, pad_edge=False)
    for change in status["recoveries"][:-7:-1]:
        times = (change[f"{phase}_ms"] for phase in phases)
        ranks = (" ".join(map(str, change[name])) or "–" for name in ("lost", "joined"))
        table.add_row(
            str(change["epoch"]), change["cause"], *ranks, *("–" if ms is None else f"{ms:.0f}" for ms in times)
        )
    return table


def show(status: Callable[[], dict[str, Any]], every: float, looks: int | None = None) -> None:
    """Until interrupted, or so many looks. Raises what `status` raises."""
    console, view = Console(), View()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while looks is None or looks > 0:
            live.update(view.update(status(), time.monotonic(), console.width), refresh=True)
            looks = None if looks is None else looks - 1
            if looks != 0:
                time.sleep(every)
