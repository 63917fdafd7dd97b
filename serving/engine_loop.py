"""What an engine process does once its engine is built: obey the commands that have arrived, and unless parked take a
step with the other ranks. Everything it has to say leaves through one function, so a test can stand in for the process.

Commands: add, cancel, bell, score, status. Answers: events, score, status.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.engine import Engine, ScoreJob
from moe_jax.executables import compilations
from serving.channel import Message
from serving.inbox import Inbox
from serving.messages import pack_event, unpack_request

HEARTBEAT = 1.0  # seconds: while steps go on, something is said at least this often
SCORE_BYTES = 16 << 20  # of log-probabilities in one message


class EngineLoop:
    """Not thread-safe: the inbox's thread only queues."""

    def __init__(self, engine: Engine, send: Callable[..., None]) -> None:
        """`send` as Channel.send."""
        self.engine, self._send = engine, send
        self._scores: dict[int, ScoreJob] = {}
        self._said = time.monotonic()

    def run(self, inbox: Inbox) -> None:
        while True:
            for message in inbox.take(wait=self.engine.parked):
                self.handle(message)
            if not self.engine.parked:
                self.step()

    def handle(self, message: Message) -> None:
        """Obey one command. A request is sent before the bell that announces it, so whoever heard the bell has it."""
        body = message.body
        match body["type"]:
            case "add":
                # The queue's bound is kept by the sender; here it would come too late to refuse.
                self.engine.add(0, unpack_request(body["request"]), accepted=True)
            case "cancel":
                self.engine.cancel(str(body["number"]))
            case "bell":
                self.engine.bells_heard = max(self.engine.bells_heard, body["bell"])
            case "score":
                try:
                    self._scores[body["number"]] = self.engine.add_score(0, body["token_ids"], body["chunk"])
                except ValueError as e:
                    self._send({"type": "score", "number": body["number"], "error": str(e)})
            case "status":
                self._send({"type": "status", **self.status()})
            case other:
                raise ValueError(f"command: found {other!r}, expected add, cancel, bell, score or status")

    def step(self) -> None:
        """One step; its tokens leave as one message."""
        events = self.engine.step()
        now = time.monotonic()
        if events or now - self._said >= HEARTBEAT:
            self._said = now
            self._send({"type": "events", "events": [pack_event(e) for e in events]})
        for number, job in list(self._scores.items()):
            self._send_scores(number, job)

    def status(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "compilations": compilations.count,
            "steps": engine.steps,
            "level": engine.level,
            "bells_heard": engine.bells_heard,
            "bells_answered": engine.bells_answered,
            "parked": engine.parked,
        }

    def _send_scores(self, number: int, job: ScoreJob) -> None:
        """Send the rows that are done, in messages of bounded size, and forget them."""
        for rows in job.rows:
            at_once = max(1, SCORE_BYTES // (4 * rows.shape[1]))
            for i in range(0, len(rows), at_once):
                part = np.ascontiguousarray(rows[i : i + at_once], np.float32)
                self._send({"type": "score", "number": number, "shape": part.shape}, part.tobytes())
        job.rows.clear()
        if not job.sequence.remaining:
            del self._scores[number]
            self._send({"type": "score", "number": number, "done": True})
