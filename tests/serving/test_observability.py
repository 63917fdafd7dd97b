"""Metrics, the status page, `top`, and logs, of a server with fake engines."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

import serving
from serving.access import Key, digest
from serving.cli import main
from serving.logs import JsonFormatter
from serving.metrics import Metrics, Step
from serving.protos import inference_pb2 as pb
from serving.top import View
from tests.serving.clusters import fake_cluster
from tests.serving.test_api import PATIENT, Running, refused, request

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    running = Running(fake_cluster(("a", "b", "c"), fake={"step": 0.002}, **PATIENT))
    running.web = "http://" + running.call(lambda: running.server.start_web("127.0.0.1:0"))  # type: ignore[attr-defined]
    yield running
    running.close()


def get(url: str, **headers: str) -> tuple[int, str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode(), e.headers


def samples(text: str) -> dict[str, float]:
    """By name and labels, as in "name{label=value}"."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "le")
            if sample.labels.get("le", "+Inf") == "+Inf":
                found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_metrics(served):
    before = samples(get(served.web + "/metrics")[1])
    calls = [served.inference.Generate(request(300, seed=i)) for i in range(6)]
    first = [next(call) for call in calls]
    os.kill(served.status()["ranks"][1]["pid"], SIGKILL)
    assert all(list(call)[-1].finish_reason == "length" for call in calls) and first
    cancelled = served.inference.Generate(request(10000, request_id="x"))
    next(cancelled)
    served.inference.Cancel(pb.CancelRequest(request_id="x"))
    served.until(lambda s: s["requests"]["open"] == 0 and all(r["state"] == "live" for r in s["ranks"]))
    code, text, headers = get(served.web + "/metrics")
    assert code == 200 and headers["Content-Type"].startswith("text/plain")
    found = {name: value - before.get(name, 0.0) for name, value in samples(text).items()}
    prefixed = {name.removeprefix("moe_jax_"): value for name, value in found.items()}
    assert prefixed["request_success_total{finished_reason=length}"] == 6
    assert prefixed["request_success_total{finished_reason=abort}"] == 1
    assert prefixed["prompt_tokens_total"] == 21 and prefixed["generation_tokens_total"] >= 1800
    assert prefixed["requests_migrated_total"] >= 1
    for name, count in (
        ("time_to_first_token_seconds", 7),
        ("e2e_request_latency_seconds", 6),
        ("request_queue_time_seconds", 7),
        ("request_prefill_time_seconds", 7),
        ("request_decode_time_seconds", 6),
    ):
        assert prefixed[f"{name}_count"] == count, name
    assert prefixed["inter_token_latency_seconds_count"] == prefixed["generation_tokens_total"] - 7
    now = samples(text)
    assert now["moe_jax_epoch"] == served.status()["epoch"] and now["moe_jax_ranks{state=live}"] == 3
    assert now["moe_jax_experts_missing"] == 0 and now["moe_jax_survivable_host_losses"] >= 0
    assert now["moe_jax_pause_seconds_count"] >= 1 and now["moe_jax_recovery_seconds_count{phase=agree}"] >= 2


def test_the_dashboard_asks_for_metrics_that_there_are(served):
    text = get(served.web + "/metrics")[1]
    known = set(re.findall(r"^(moe_jax_\w+)", text, re.MULTILINE)) | {"moe_jax_kv_cache_usage_perc"}
    asked = set(re.findall(r"moe_jax_\w+", DASHBOARD.read_text()))
    assert asked and asked <= known, asked - known


def test_status_page(served):
    code, page, headers = get(served.web + "/")
    assert code == 200 and "<title>moe-jax</title>" in page
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "http" not in page.replace("http-equiv", "")  # nothing comes from elsewhere
    status = json.loads(get(served.web + "/status.json?slots=1")[1])
    assert len(status["slots"]) == 2 and len(status["slots"][0]) == 3
    assert "slots" not in json.loads(get(served.web + "/status.json")[1])
    assert get(served.web + "/etc/passwd")[0] == 404
    request_ = urllib.request.Request(served.web + "/", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request_, timeout=10)


def test_status_page_with_keys():
    keys = (Key("a", digest("a" * 20)), Key("root", digest("r"), admin=True))
    running = Running(fake_cluster(("a",), replication=1, slots=8, **PATIENT), keys=keys, key="r")
    try:
        web = "http://" + running.call(lambda: running.server.start_web("127.0.0.1:0"))
        code, _, headers = get(web + "/metrics")
        assert code == 401 and headers["WWW-Authenticate"].startswith("Basic")
        assert get(web + "/metrics", Authorization="Bearer " + "a" * 20)[0] == 200
        basic = base64.b64encode(b"anybody:" + b"a" * 20).decode()
        assert get(web + "/", Authorization="Basic " + basic)[0] == 200
        for wrong in ("Basic !", "Basic " + base64.b64encode(b"\xff").decode(), "Bearer x", "x" * 9000):
            assert get(web + "/", Authorization=wrong)[0] == 401
    finally:
        running.close()


def test_top(served, capsys):
    assert main(["top", "--address", served.address, "--looks", "2", "--every", "0.01"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    view, status = View(), json.loads(served.admin.Status(pb.StatusRequest(slots=True)).json)
    view.update(status, 0.0)
    status["requests"]["tokens"] += 100
    status["ranks"][1] |= {"state": "lost", "pid": None, "device": None}
    output = io.StringIO()
    Console(file=output, width=120).print(view.update(status, 0.5))
    text = output.getvalue()
    assert "SERVING" in text and "200 tokens/s" in text and "lost" in text and text.count("■") == 3 * 2 * 4 + 4


def test_logs_tell_of_each_request(served, caplog):
    with caplog.at_level(logging.INFO, "moe_jax.requests"):
        served.inference.Complete(request(5, request_id="logged"))
    (record,) = [r for r in caplog.records if vars(r).get("request_id") == "logged"]
    line = json.loads(JsonFormatter(lambda: 7).format(record))
    assert (line["request_id"], line["finish_reason"], line["completion_tokens"]) == ("logged", "length", 5)
    assert line["epoch"] == 7 and line["logger"] == "moe_jax.requests" and line["level"] == "INFO"
    wrong = ValueError("wrong")
    record = logging.LogRecord("x", logging.ERROR, "", 0, "it was %s", ("so",), (ValueError, wrong, None))
    line = json.loads(JsonFormatter(lambda: None).format(record))
    assert line["message"] == "it was so" and "ValueError: wrong" in line["exception"] and "epoch" not in line


def test_a_drained_server_lets_requests_finish():
    """New ones are refused, health says so, and what is open goes on to its end."""
    running = Running(fake_cluster(("a", "b"), fake={"step": 0.005}, **PATIENT))
    try:
        call = running.inference.Generate(request(200))
        next(call)
        draining = running.begin(running.server.drain(30.0))
        running.until(lambda _: running.call(lambda: running.server.inference._refusing))
        with refused(grpc.StatusCode.UNAVAILABLE, "the server shuts down"):
            running.inference.Complete(request(5))
        assert list(call)[-1].usage.completion_tokens == 200
        draining.result(10)
    finally:
        running.close()


def test_metrics_forget_what_has_ended():
    metrics = Metrics()
    metrics.accepted(1, 0.0)
    metrics.placed(1, 3, 1.0)
    metrics.placed(9, 3, 1.0)  # a score
    seen: list[Any] = []
    metrics.finished.append(seen.append)
    metrics.ended(1, "r", "me", "stop", 3, 0, 2.0)
    metrics.ended(1, "r", "me", "stop", 3, 0, 2.0)
    assert not metrics._open and [f.times.places for f in seen] == [[(1.0, 3)]]
    assert serving.__file__


def test_traces(served):
    """A span for each request and its parts, in the trace of whoever asked."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from serving.tracing import Traces

    memory, metrics = InMemorySpanExporter(), served.server.coordinator.metrics
    traces = Traces(memory)
    served.call(lambda: metrics.finished.append(traces.finished))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    served.inference.Complete(request(7, request_id="traced"), metadata=[("traceparent", parent)])
    served.inference.Complete(request(3, request_id="alone"), metadata=[("traceparent", "no such thing")])
    served.call(metrics.finished.clear)
    traces.close()
    every: Any = memory.get_finished_spans()
    spans = [span for span in every if span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C]
    by_name = {span.name: span for span in spans}
    assert sorted(span.name for span in spans) == ["decode", "prefill", "queue", "rank", "request", *["step"] * 6]
    whole = by_name["request"]
    assert whole.parent.span_id == 0xB7AD6B7169203331 and whole.attributes["completion_tokens"] == 7
    parents = {"queue": "request", "rank": "request", "prefill": "rank", "decode": "rank", "step": "decode"}
    for span in spans:
        if span is not whole:
            parent = by_name[parents[span.name]]
            assert span.parent.span_id == parent.context.span_id
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
    (rank,) = whole.attributes["ranks"]
    steps = [span for span in spans if span.name == "step"]
    assert {span.attributes["rank"] for span in [*steps, by_name["prefill"]]} == {rank}
    assert len({span.attributes["step"] for span in steps}) == 6
    assert {span.attributes["epoch"] for span in steps} == {served.status()["epoch"]}


def test_traces_of_a_request_that_moves():
    """Each rank has its own prefill and steps; without anybody who keeps traces nothing is recorded."""
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from serving.tracing import Traces

    memory, metrics = InMemorySpanExporter(), Metrics()
    metrics.accepted(1, 0.0)
    metrics.token(1, 0.5, Step(1, 0, 1))
    assert metrics._open[1].steps is None
    traces = Traces(memory)
    metrics.finished.append(traces.finished)
    metrics.accepted(2, 1.0)
    for rank, epoch, at in ((3, 1, 2.0), (0, 2, 7.0)):
        metrics.placed(2, rank, at)
        for i in range(1, 4):
            metrics.token(2, at + i, Step(epoch, rank, 10 * rank + i))
    metrics.ended(2, "r", "", "length", 5, 6, 10.0)
    traces.close()
    spans: Any = memory.get_finished_spans()
    found = [(s.name, *(s.attributes.get(n) for n in ("rank", "tokens", "steps", "epoch", "step"))) for s in spans]
    for rank, tokens_, epoch in ((3, 5, 1), (0, 8, 2)):
        assert ("prefill", rank, tokens_, None, None, None) in found and ("decode", rank, None, 2, None, None) in found
        assert [f for f in found if f[0] == "step" and f[1] == rank] == [
            ("step", rank, None, None, epoch, 10 * rank + i) for i in (2, 3)
        ]
