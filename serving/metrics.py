"""What Prometheus is told, under the names that users of vLLM know with our prefix, `moe_jax_`.

Latencies are observed as they happen. All else is read from the status when it is asked for, so that it costs nothing
otherwise. Belongs to the coordinator's event loop but for `render`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.access import trace_parent

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STATES = ("live", "joining", "lost")
PHASES = ("detect", "fence", "agree", "fail", "load", "compile", "rebuild", "first_step", "resume")

requests_log = logging.getLogger("moe_jax.requests")


class Step(NamedTuple):
    """Of an engine, as it says with the tokens that it made."""

    epoch: int
    rank: int
    number: int  # counted by the engine since its start


@dataclass(slots=True)
class Times:
    """Of one open request, in seconds of time.monotonic."""

    accepted: float
    parent: str | None = None  # the caller's trace, as it said
    placed: float | None = None
    first: float | None = None  # token
    last: float | None = None
    places: list[tuple[float, int]] = field(default_factory=list)  # when it was given to which rank
    steps: list[tuple[float, Step]] | None = None  # of each token; None: nobody keeps traces


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended, for whoever keeps traces."""

    request_id: str
    owner: str
    reason: str
    prompt_tokens: int
    tokens: int
    times: Times
    ended: float


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.finished: list[Callable[[Finished], None]] = []  # to be told of each request that ends
        self._open: dict[int, Times] = {}  # by the request's key

        def histogram(name: str, text: str, buckets: Sequence[float] = _SLOW, labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"moe_jax_{name}", text, labels, registry=registry, buckets=buckets)

        self._first_token = histogram("time_to_first_token_seconds", "From acceptance to the first token.")
        self._gap = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _FAST)
        self._whole = histogram("e2e_request_latency_seconds", "From acceptance to the last token.")
        self._queued = histogram("request_queue_time_seconds", "From acceptance to a place on a rank.")
        self._prefill = histogram("request_prefill_time_seconds", "From a place on a rank to the first token.")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self._pause = histogram("pause_seconds", "Longest gap of any stream across a change of ranks.", _FAST)
        self._recovery = histogram("recovery_seconds", "Phases of a change of ranks.", _FAST, ("phase",))
        self._success = Counter(
            "moe_jax_request_success", "Requests that ended.", ("finished_reason",), registry=registry
        )
        self._recorded = 0  # the last epoch whose recovery was observed

    # As it happens

    def accepted(self, key: int, now: float) -> None:
        self._open[key] = Times(now, trace_parent(), steps=[] if self.finished else None)

    def placed(self, key: int, rank: int, now: float) -> None:
        times = self._open.get(key)
        if times is None:  # no request, but a score
            return
        times.places.append((now, rank))
        if times.placed is None:
            times.placed = now
            self._queued.observe(now - times.accepted)

    def token(self, key: int, now: float, step: Step) -> None:
        times = self._open.get(key)
        if times is None:
            return
        if times.last is not None:
            self._gap.observe(now - times.last)
        else:
            times.first = now
            self._first_token.observe(now - times.accepted)
            self._prefill.observe(now - (times.placed or times.accepted))
        times.last = now
        if times.steps is not None:
            times.steps.append((now, step))

    def ended(self, key: int, request_id: str, owner: str, reason: str, prompt: int, tokens: int, now: float) -> None:
        times = self._open.pop(key, None)
        if times is None:
            return
        self._success.labels(reason).inc()
        if reason != "abort":
            self._whole.observe(now - times.accepted)
            if times.first is not None:
                self._decode.observe(now - times.first)
        done, ranks = (
            Finished(request_id, owner, reason, prompt, tokens, times, now),
            [rank for _, rank in times.places],
        )
        requests_log.info(
            "%s: %s after %d tokens in %.3f s",
            *(request_id, reason, tokens, now - times.accepted),
            extra={"request_id": request_id, "key": owner, "finish_reason": reason, "prompt_tokens": prompt}
            | {"completion_tokens": tokens, "seconds": round(now - times.accepted, 6), "ranks": ranks},
        )
        for tell in self.finished:
            tell(done)

    def recoveries(self, records: list[dict[str, Any]]) -> None:
        """Observe those that are over, each once; `records` as the status has them, without those still going on."""
        for record in records:
            if record["epoch"] <= self._recorded:
                continue
            self._recorded = record["epoch"]
            for phase in PHASES:
                if (ms := record.get(f"{phase}_ms")) is not None:
                    self._recovery.labels(phase).observe(ms / 1000)
            if record["pause_ms"] is not None:
                self._pause.observe(record["pause_ms"] / 1000)

    # When it is asked for

    def render(self, status: Mapping[str, Any]) -> bytes:
        """The text format. In any thread; `status` as Coordinator.status."""
        registry = CollectorRegistry()
        registry.register(_Present(status))
        return generate_latest(self.registry) + generate_latest(registry)


class _Present(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status, requests = self._status, self._status["requests"]
        experts = status["experts"] or {}

        def gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"moe_jax_{name}", text, value=float("nan") if value is None else value)

        def counter(name: str, text: str, value: float) -> CounterMetricFamily:
            return CounterMetricFamily(f"moe_jax_{name}", text, value=value)

        yield gauge("num_requests_running", "Requests that have a place.", requests["open"] - requests["waiting"])
        yield gauge("num_requests_waiting", "Requests that wait for one.", requests["waiting"])
        used = GaugeMetricFamily("moe_jax_kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", labels=("rank",))
        ranks = GaugeMetricFamily("moe_jax_ranks", "Ranks by state.", labels=("state",))
        for rank in status["ranks"]:
            if rank["kv_cache_usage"] is not None:
                used.add_metric((str(rank["rank"]),), rank["kv_cache_usage"])
        for state in _STATES:
            ranks.add_metric((state,), sum(rank["state"] == state for rank in status["ranks"]))
        yield used
        yield ranks
        yield counter("prompt_tokens", "Of accepted requests.", requests["prompt_tokens"])
        yield counter("generation_tokens", "That clients were sent.", requests["tokens"])
        yield counter("requests_migrated", "Times that a request had to leave its rank.", requests["moved"])
        yield counter("requests_refused", "At a bound of the queue or of a key.", requests["refused"])
        yield gauge("epoch", "Number of the epoch.", status["epoch"])
        yield gauge("serving", "1 while requests are served.", status["state"] in ("SERVING", "DRAINING"))
        yield gauge("experts_missing", "Logical experts without a live slot, all layers.", experts.get("missing"))
        lost = experts.get("survivable_host_losses")
        yield gauge("survivable_host_losses", "Hosts that may be lost with nothing to load.", lost)
        uneven = experts.get("imbalance")
        yield gauge("expert_imbalance", "Measured load of the most loaded rank over the mean.", uneven)
        yield counter("rebalances", "Times that experts were moved after their load.", status["rebalances"])
        yield gauge(
            "compilations",
            "Programs that epochs waited for since serving began, for they had to be compiled.",
            status["compilations"],
        )
