"""Traces for OpenTelemetry: of each request that ends a span, and in it its queue, its prefill and its decoding, on the
ranks where these took place. They belong to the caller's trace, if it said `traceparent` (W3C Trace Context).

Needs `moe-jax[otel]`. Spans are made when a request has ended, of times that were taken anyway, and sent in the
background: nothing waits for a collector, and what it does not take is dropped.
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.metrics import Finished


def exporter(endpoint: str) -> SpanExporter:
    """To an OTLP collector that speaks gRPC at "http://host:port" or "https://…"."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))


class Traces:
    """`finished` is for Metrics.finished."""

    def __init__(self, export: SpanExporter) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "moe-jax"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(export))
        self._tracer = self._provider.get_tracer("moe_jax")
        self._propagator = TraceContextTextMapPropagator()

    def finished(self, done: Finished) -> None:
        times, offset = done.times, time.time_ns() - time.monotonic_ns()

        def span(name: str, begin: float, end: float, parent: Any, **attributes: Any) -> Any:
            start = offset + int(1e9 * begin)
            made = self._tracer.start_span(name, parent, trace.SpanKind.SERVER, attributes, start_time=start)
            made.end(offset + int(1e9 * end))
            return trace.set_span_in_context(made)

        caller = self._propagator.extract({"traceparent": times.parent}) if times.parent else None
        ranks = list(done.ranks)
        whole = span(
            "request",
            times.accepted,
            done.ended,
            caller,
            **{"request.id": done.request_id, "key": done.owner, "finish_reason": done.reason, "ranks": ranks},
            **{"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens, "moves": times.moves},
        )
        placed = done.ended if times.placed is None else times.placed
        span("queue", times.accepted, placed, whole)
        if ranks:
            first = done.ended if times.first is None else times.first
            span("prefill", placed, first, whole, rank=ranks[0], tokens=done.prompt_tokens)
            if times.first is not None:
                span("decode", first, done.ended, whole, rank=ranks[-1], steps=done.tokens)

    def close(self) -> None:
        """Blocks for some seconds at most, for what has not been sent."""
        self._provider.force_flush(3000)
        self._provider.shutdown()
