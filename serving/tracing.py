"""Traces for OpenTelemetry, of each request that has ended:

    request                                   the caller's trace goes on in it, if there was a `traceparent`
        queue
        rank (rank)                           one for each rank that it was given to
            prefill (rank, tokens)            also of what had been computed elsewhere
            decode (rank, steps)
                step (rank, epoch, step)      one for each token, as the engine counts its steps

Needs `moe-jax[otel]`. Times are the coordinator's. Spans are made when a request has ended and sent in the background,
both in other threads: nothing waits for a collector, and what it does not take is dropped. A caller whose `traceparent`
is not sampled costs nothing.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.metrics import Finished

_QUEUE = 1 << 15  # spans that wait to be sent; more are dropped
_WAITING = 1 << 10  # requests whose spans are not made yet; more are dropped


def exporter(endpoint: str) -> SpanExporter:
    """To an OTLP collector that speaks gRPC at "http://host:port" or "https://…"."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))


class Traces:
    """`finished` is for Metrics.finished."""

    def __init__(self, export: SpanExporter) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "moe-jax"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(export, max_queue_size=_QUEUE))
        self._tracer = self._provider.get_tracer("moe_jax")
        self._propagator = TraceContextTextMapPropagator()
        self._thread = ThreadPoolExecutor(1, "traces")
        self._waiting = 0  # requests, for the thread

    def finished(self, done: Finished) -> None:
        if self._waiting < _WAITING:
            self._waiting += 1
            self._thread.submit(self._make, done)

    def close(self) -> None:
        """Blocks for some seconds at most, for what has not been sent."""
        self._thread.shutdown()
        self._provider.force_flush(3000)
        self._provider.shutdown()

    def _make(self, done: Finished) -> None:
        self._waiting -= 1
        times, offset = done.times, time.time_ns() - time.monotonic_ns()

        def span(name: str, begin: float, end: float, parent: Any, **attributes: Any) -> Any:
            start = offset + int(1e9 * begin)
            made = self._tracer.start_span(name, parent, trace.SpanKind.SERVER, attributes, start_time=start)
            made.end(offset + int(1e9 * end))
            return trace.set_span_in_context(made)

        whole = span(
            "request",
            times.accepted,
            done.ended,
            self._propagator.extract({"traceparent": times.parent}) if times.parent else None,
            **{"request.id": done.request_id, "key": done.owner, "finish_reason": done.reason},
            **{"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens},
            ranks=[rank for _, rank in times.places],
        )
        span("queue", times.accepted, done.ended if times.placed is None else times.placed, whole)
        ends = [*(begin for begin, _ in times.places[1:]), done.ended]
        for (begin, rank), end in zip(times.places, ends, strict=True):
            place = span("rank", begin, end, whole, rank=rank)
            steps = [(at, step) for at, step in times.steps or () if begin <= at <= end and step.rank == rank]
            known = sum(at < begin for at, _ in times.steps or ())  # tokens
            first = steps[0][0] if steps else end
            span("prefill", begin, first, place, rank=rank, tokens=done.prompt_tokens + known)
            if len(steps) > 1:
                decode = span("decode", first, steps[-1][0], place, rank=rank, steps=len(steps) - 1)
                for (before, _), (at, step) in pairwise(steps):
                    span("step", before, at, decode, rank=rank, epoch=step.epoch, step=step.number)
