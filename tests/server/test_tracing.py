"""One span per generation, a child of the client's, with what happened and when."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.config import Config
from toka.text.tokenizer import Tokenizer

pytest.importorskip("opentelemetry.sdk", reason="needs the extra toka[otel]")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from toka.server.tracing import Tracer, tracer_of


@pytest.fixture
def traced(tokenizer: Tokenizer):
    """A server and the spans it has written."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with RunningServer(tokenizer, Config(), Behaviour(step_s=0.02, error_at_token=30)) as server:
        server.serving.tracer = Tracer(provider)
        yield server, exporter


def _only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    RunningServer.wait(lambda: bool(exporter.get_finished_spans()))
    [span] = exporter.get_finished_spans()
    return span


def test_a_completion(traced: tuple[RunningServer, InMemorySpanExporter]) -> None:
    server, exporter = traced
    before = time.time_ns()
    body = {"prompt": "abc", "max_tokens": 4, "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 5, "stop": ["zz"]}
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01", "x-request-id": "mine"}
    server.post("/v1/completions", body, headers=headers)
    span = _only_span(exporter)
    assert span.name == "text_completion tiny-bytes"
    assert format(span.context.trace_id, "032x") == trace_id
    assert format(span.parent.span_id, "016x") == parent_id
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "toka",
        "gen_ai.request.model": "tiny-bytes",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("zz",),
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 8,
    }
    assert {name: span.attributes[name] for name in expected} == expected
    assert span.attributes["gen_ai.latency.time_to_first_token"] >= 0.02
    assert span.attributes["gen_ai.latency.time_in_model_decode"] >= 3 * 0.02
    assert before <= span.start_time < span.end_time <= time.time_ns()
    assert [event.name for event in span.events] == ["first step", "first token"]
    assert span.start_time <= span.events[0].timestamp <= span.events[1].timestamp <= span.end_time


def test_a_chat_that_fails(traced: tuple[RunningServer, InMemorySpanExporter]) -> None:
    server, exporter = traced
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50})
    span = _only_span(exporter)
    assert span.name == "chat tiny-bytes"
    assert span.parent is None
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "SampleFailedError"


def test_off_it_is_not_even_imported() -> None:
    code = "import sys, toka.server.launch; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert tracer_of(None) is None


def test_a_collector_that_is_not_there_harms_nobody(start_server) -> None:
    server = start_server(Behaviour(), otlp_endpoint="http://127.0.0.1:9/v1/traces")
    assert server.post("/v1/completions", {"prompt": "abc", "max_tokens": 4}).status_code == 200
