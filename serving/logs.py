"""Logs for machines: one JSON object a line, with whatever a record has beside its text (request_id, key, …)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

_COMMON = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """epoch: the cluster's, at the time of writing; None: not known here."""

    def __init__(self, epoch: Callable[[], int | None]) -> None:
        super().__init__()
        self._epoch = epoch

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (epoch := self._epoch()) is not None:
            line["epoch"] = epoch
        line |= {name: value for name, value in vars(record).items() if name not in _COMMON}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def use_json(epoch: Callable[[], int | None]) -> None:
    """From now on, in the whole process."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter(epoch))
