"""What a coordinator must remember when it dies: numbers, epochs, the JAX service, requests and their tokens.

One sqlite file in WAL mode, for one process at a time. What was committed survives the death of the process. When the
machine dies, the last moments may be missing, but nothing is broken: only checkpoints wait for the disk.

All tokens go to the end of one log, so a step costs a page or two of the file, however many requests it has tokens for.
The log is kept short: an output is written in one piece when its request ends, or when its tokens have come to be the
oldest in the log; what nobody needs any more is deleted from the start.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np

from moe_jax.request import Request, SamplingParams, TokenEvent
from serving.admission import Owner
from serving.epoch import Epoch
from serving.ledger import Entry

_VERSION = 1
_EPOCHS = 100  # that are kept
_LIFE = 10**12  # numbers for one life of the coordinator
_TRIM = 512  # rows: the log's start is not cut for less
_FREE_PAGES = 1024  # that stay in the file for what comes next
_LOCK_S = 1.0  # for the process that had the file to be gone

_SETTINGS = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 16777216;
"""
_TABLES = f"""
BEGIN;
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE epochs (number INTEGER PRIMARY KEY, body TEXT NOT NULL, slots BLOB NOT NULL);
CREATE TABLE requests (key INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, prompt BLOB NOT NULL,
                       body TEXT NOT NULL, created REAL NOT NULL, ended REAL, reason TEXT);
CREATE TABLE outputs (key INTEGER PRIMARY KEY, tokens BLOB NOT NULL, logprobs BLOB NOT NULL, tops TEXT NOT NULL);
CREATE TABLE log (id INTEGER PRIMARY KEY, key INTEGER NOT NULL, number INTEGER NOT NULL, token INTEGER NOT NULL,
                  logprob REAL, top TEXT NOT NULL, reason TEXT);
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class Journal:
    """path None: in memory, for a coordinator whose requests need not outlive it. To be used by one thread at a time.

    keep, keep_s: how many ended requests are kept, and for how many seconds. span: tokens that the log holds, roughly.
    clock: seconds since the epoch.

    Each method is one commit, unless it is called inside `transaction`. Raises ValueError for a file that is no journal
    of this version, RuntimeError for one that is in use, and sqlite3.Error from any method when the disk fails: nothing
    that was not committed may be told to anyone then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        keep: int = 1024,
        keep_s: float = 600.0,
        span: int = 1 << 16,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keep, self._keep_s, self._span, self._clock = keep, keep_s, span, clock
        self._db = _open(path)
        life = self.get("life", 0)
        # Ledger.first_number: neither this journal nor an engine that outlived the last coordinator knows a number
        # from here on. Not all numbers that were used are in the journal, so those of a life are left out together.
        self.first_number = life * _LIFE + 1
        self.put("life", life + 1)
        self._kept: deque[tuple[float, int]] = deque(
            self._select("SELECT ended, key FROM requests WHERE ended IS NOT NULL ORDER BY ended")
        )
        first, last = self._select("SELECT min(id), max(id) FROM log")[0]
        self._first, self._last = first or 1, last or 0  # rows of the log
        # Requests with tokens that are in the log alone, and the row of the first of these; in the order of the rows.
        self._logged: dict[int, tuple[int, Entry]] = {}
        # Requests that had not ended, for Ledger.restore. The text of one may be complete all the same: that is not
        # known here before `finish`, and is to be found again from its tokens.
        self.unfinished = self._load_unfinished()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that happens inside is one commit. When it raises, nothing of it is kept and the journal is closed."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.close()  # rolls back; `_logged` may say now that something is written which is not
            raise

    # State of the cluster

    def get(self, name: str, default: Any = None) -> Any:
        """The JSON value of this name."""
        rows = self._select("SELECT value FROM state WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else default

    def put(self, name: str, value: Any) -> None:
        with self.transaction():
            self._db.execute("REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    def numbers(self, epoch: int, incarnation: int, generation: int) -> None:
        """The last ones used. To be kept before anybody hears of them."""
        self.put("numbers", [epoch, incarnation, generation])

    @property
    def last_numbers(self) -> tuple[int, int, int]:
        """(epoch, incarnation, generation), for Membership.restore_from; zeros in a new journal."""
        epoch, incarnation, generation = self.get("numbers", [0, 0, 0])
        return epoch, incarnation, generation

    def epoch(self, epoch: Epoch) -> None:
        """To be kept before it is announced. Only the last hundred are, and all orders of the last generation."""
        body = vars(epoch) | {"slots": epoch.slots.shape}
        with self.transaction():
            orders = self.orders(epoch.generation) | {epoch.order: epoch.incarnations}
            self.put("communicators", [epoch.generation, list(orders.items())])
            slots = np.ascontiguousarray(epoch.slots, np.int32).tobytes()
            self._db.execute("REPLACE INTO epochs VALUES (?, ?, ?)", (epoch.number, json.dumps(body), slots))
            self._db.execute("DELETE FROM epochs WHERE number <= ?", (epoch.number - _EPOCHS,))

    @property
    def last_epoch(self) -> Epoch | None:
        for body, slots in self._select("SELECT body, slots FROM epochs ORDER BY number DESC LIMIT 1"):
            fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(body).items()}
            fields["slots"] = np.frombuffer(slots, np.int32).reshape(fields["slots"])
            return Epoch(**fields)
        return None

    def orders(self, generation: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The orders of ranks that this generation, the last one, has had: the last incarnations in each."""
        known, orders = self.get("communicators", [0, []])
        return {tuple(order): tuple(incarnations) for order, incarnations in orders} if known == generation else {}

    # Requests

    def accept(self, entry: Entry) -> None:
        """A new request. One of the same id that has ended is forgotten."""
        asked, now = entry.asked, self._clock()
        body = {"params": vars(asked.params), "eos_token_ids": asked.eos_token_ids, "seed": entry.seed}
        body |= {"owner": entry.owner.name, "priority": entry.priority}
        with self.transaction():
            for (key,) in self._select("SELECT key FROM requests WHERE request_id = ?", asked.request_id):
                self._forget(key)
            row = (entry.key, asked.request_id, array("i", asked.token_ids).tobytes(), json.dumps(body), now)
            self._db.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, NULL, NULL)", row)
            self._forget_old()

    def tokens(self, taken: Sequence[tuple[Entry, TokenEvent]]) -> None:
        """What Ledger.take has taken. To be kept before clients hear of it."""
        rows = []
        for entry, event in taken:
            self._last += 1
            self._logged.setdefault(entry.key, (self._last, entry))
            top = json.dumps(event.top) if event.top else ""
            rows.append((self._last, entry.key, event.index, event.token, event.logprob, top, event.finish_reason))
        with self.transaction():
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            self._shorten_log(len(rows))

    def finish(self, entry: Entry) -> None:
        """It has ended. What was cancelled is forgotten."""
        with self.transaction():
            self._logged.pop(entry.key, None)
            if entry.finish_reason == "abort":
                self._forget(entry.key)
            else:
                now = self._clock()
                self._write_output(entry)
                row = (now, entry.finish_reason, entry.key)
                self._db.execute("UPDATE requests SET ended = ?, reason = ? WHERE key = ?", row)
                self._kept.append((now, entry.key))
            self._forget_old()

    def ended(self, request_id: str) -> Entry | None:
        """The request of this id, if it has ended and is still kept."""
        for entry in self._read("ended IS NOT NULL AND request_id = ?", request_id):
            entry.ended = True
            return entry
        return None

    def _read(self, where: str, *values: Any) -> Iterator[Entry]:
        """Requests, oldest first, with what is written in one piece of their outputs."""
        columns = "key, request_id, prompt, body, reason, tokens, logprobs, tops"
        rows = f"SELECT {columns} FROM requests LEFT JOIN outputs USING (key) WHERE {where} ORDER BY key"
        for key, request_id, prompt, body, reason, tokens, logprobs, tops in self._select(rows, *values):
            body = json.loads(body)
            params = SamplingParams(**body["params"])
            asked = Request(request_id, array("i", prompt), params, eos_token_ids=body["eos_token_ids"])
            owner, priority = Owner(body.get("owner", "")), body.get("priority", 0)
            entry = Entry(key, asked, body["seed"], finish_reason=reason, owner=owner, priority=priority)
            if tokens is not None:
                entry.tokens, entry.logprobs = array("i", tokens), array("d", logprobs)
                entry.tops = [_top(t) for t in json.loads(tops)] if tops else [()] * len(entry.tokens)
            yield entry

    def _load_unfinished(self) -> list[Entry]:
        entries = {entry.key: entry for entry in self._read("ended IS NULL")}
        for row, key, index, token, logprob, top, reason in self._db.execute("SELECT * FROM log ORDER BY id"):
            entry = entries.get(key)
            if entry is not None and index == len(entry.tokens):
                logprob = math.nan if logprob is None else logprob  # sqlite has no other word for it
                top = _top(json.loads(top)) if top else ()
                entry.append(TokenEvent(entry.asked.request_id, index, token, logprob, top, reason))
                self._logged.setdefault(key, (row, entry))
        for entry in entries.values():
            if entry.finish_reason is not None:  # the last token was kept, and then there was no time to say so
                self.finish(entry)
        return [entry for entry in entries.values() if entry.finish_reason is None]

    def _write_output(self, entry: Entry) -> None:
        tops = json.dumps(entry.tops) if any(entry.tops) else ""
        row = (entry.key, entry.tokens.tobytes(), entry.logprobs.tobytes(), tops)
        self._db.execute("REPLACE INTO outputs VALUES (?, ?, ?, ?)", row)

    def _select(self, query: str, *values: Any) -> list[Any]:
        return self._db.execute(query, values).fetchall()

    # Keeping the file small

    def _shorten_log(self, added: int) -> None:
        """A little at a time: each call does work in proportion to the rows that were added, and no more."""
        for key, (row, entry) in list(islice(self._logged.items(), 1 + len(self._logged) // 64)):
            if row <= self._last - self._span:
                self._write_output(entry)
                del self._logged[key]
        needed = next((row for row, _ in self._logged.values()), self._last + 1)
        if needed - self._first >= _TRIM:
            self._first = min(needed, self._first + 2 * max(added, _TRIM))
            self._db.execute("DELETE FROM log WHERE id < ?", (self._first,))
            self._vacuum()

    def _forget_old(self) -> None:
        oldest = self._clock() - self._keep_s
        while self._kept and (len(self._kept) > self._keep or self._kept[0][0] < oldest):
            self._forget(self._kept.popleft()[1])
            self._vacuum()

    def _forget(self, key: int) -> None:
        self._db.execute("DELETE FROM requests WHERE key = ?", (key,))
        self._db.execute("DELETE FROM outputs WHERE key = ?", (key,))

    def _vacuum(self) -> None:
        """Give some pages back to the file system, if many are free."""
        if self._select("PRAGMA freelist_count")[0][0] > _FREE_PAGES:
            self._select("PRAGMA incremental_vacuum(64)")


def _top(pairs: list[list[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in pairs)


def _open(path: str | os.PathLike[str] | None) -> sqlite3.Connection:
    if path is not None:
        with suppress(FileExistsError):  # prompts are nobody else's business
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    name = ":memory:" if path is None else os.fspath(path)
    db = sqlite3.connect(name, timeout=_LOCK_S, isolation_level=None, check_same_thread=False)
    try:
        for setting in _SETTINGS.strip().splitlines():
            db.execute(setting).fetchall()
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(_TABLES)
        elif found != _VERSION:
            raise ValueError(f"{name}: found no journal of version {_VERSION} (but {found}): move it away")
    except sqlite3.OperationalError as e:
        db.close()
        if e.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RuntimeError(f"{name}: in use by another process, expected one coordinator at a time") from None
        raise
    except sqlite3.DatabaseError as e:
        db.close()
        raise ValueError(f"{name}: found no journal ({e}): move it away") from None
    except BaseException:
        db.close()
        raise
    return db
