"""The process of one rank's engine: `python -m serving.engine_process RANK FD`.

It holds the rank's device and runs its steps. All it is told comes over the channel FD, a Unix socket: it has no TCP
socket but those of JAX. It starts in two commands, `start` (join the JAX service, open the checkpoint) and `epoch` (these
ranks form the mesh), and then repeats: obey what has arrived, and unless parked take a step with the other ranks.

Commands: start, epoch, add, cancel, bell, score, status. Answers: joined, ready, events, score, status, error.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.channel import Channel, Message
from serving.inbox import Inbox

if TYPE_CHECKING:
    import numpy as np

    from moe_jax.engine import Engine, ScoreJob

Send = Callable[..., None]  # as Channel.send

HEARTBEAT = 1.0  # seconds: while steps go on, this often at least something is said
SCORE_BYTES = 16 << 20  # of log-probabilities in one message


class EngineLoop:
    """Commands in, steps, answers out, for a built engine."""

    def __init__(self, engine: Engine, send: Send) -> None:
        self.engine, self._send = engine, send
        self._scores: list[tuple[int, ScoreJob, int]] = []  # (number, job, rows already sent away)
        self._said = time.monotonic()

    def run(self, inbox: Inbox) -> None:
        while True:
            for message in inbox.take(wait=self.engine.parked):
                self.handle(message)
            if not self.engine.parked:
                self.step()

    def handle(self, message: Message) -> None:
        """Obey one command. A request comes before the bell that announces it, and so is queued when the bell is."""
        body = message.body
        match body["type"]:
            case "add":
                from serving.messages import unpack_request

                # Whoever sent it has counted it: the queue's bound is kept there.
                self.engine.ranks[0].scheduler.add(unpack_request(body["request"]), accepted=True)
            case "cancel":
                self.engine.cancel(str(body["number"]))
            case "bell":
                self.engine.bells_heard = max(self.engine.bells_heard, body["bell"])
            case "score":
                try:
                    job = self.engine.add_score(0, body["token_ids"], body["chunk"])
                    self._scores.append((body["number"], job, 0))
                except ValueError as e:
                    self._send({"type": "score", "number": body["number"], "error": str(e)})
            case "status":
                self._send(self._status())
            case other:
                raise ValueError(f"command: found {other!r}, expected add, cancel, bell, score or status")

    def step(self) -> None:
        from serving.messages import pack_event

        events = self.engine.step()
        now = time.monotonic()
        if events or now - self._said >= HEARTBEAT:
            self._said = now
            self._send({"type": "events", "events": [pack_event(e) for e in events], "steps": self.engine.steps})
        if self._scores:
            self._send_scores()

    def _send_scores(self) -> None:
        remaining: list[tuple[int, ScoreJob, int]] = []
        for number, job, _ in self._scores:
            rows, job.rows = job.rows, []
            done = job.sequence.remaining == 0
            for array in rows:
                self._send_rows(number, array)
            if done:
                self._send({"type": "score", "number": number, "done": True})
            else:
                remaining.append((number, job, 0))
        self._scores = remaining

    def _send_rows(self, number: int, rows: np.ndarray) -> None:
        """rows [count, V] float32, in messages of bounded size."""
        at_once = max(1, SCORE_BYTES // (4 * rows.shape[1]))
        for i in range(0, len(rows), at_once):
            part = rows[i : i + at_once]
            self._send({"type": "score", "number": number, "shape": part.shape}, memoryview(part).cast("B"))

    def _status(self) -> dict[str, Any]:
        from moe_jax.executables import compilations

        engine = self.engine
        return {
            "type": "status",
            "compilations": compilations.count,
            "steps": engine.steps,
            "level": engine.level,
            "bells_heard": engine.bells_heard,
            "bells_answered": engine.bells_answered,
            "parked": engine.parked,
        }
