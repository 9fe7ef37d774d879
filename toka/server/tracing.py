"""OpenTelemetry: one span per generation, with the gen_ai attributes. Nothing of it is imported unless an endpoint is configured.

A span is written when its generation is over, with the times noted on the way, so that tracing costs a running request nothing.
Attributes: OpenTelemetry's semantic conventions for generative AI; for latencies, which those lack, vLLM's names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toka.errors import ConfigError
from toka.params import SamplingParams
from toka.server.generation import Generation
from toka.server.request_context import RequestContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

PROVIDER_NAME = "toka"
_EXPORT_TIMEOUT_S = 3.0  # of one try to reach the collector, by which the server's end may be delayed
_OPERATIONS = {"prompt": "text_completion"}  # by the field that holds the prompt; the others are conversations


class Tracer:
    """Writes spans. Give it the provider that sends them; `close` sends what is left."""

    def __init__(self, provider: TracerProvider):
        from opentelemetry import trace
        from opentelemetry.trace.propagation import tracecontext

        self._provider = provider
        self._tracer = provider.get_tracer("toka.server")
        self._parent_of = tracecontext.TraceContextTextMapPropagator().extract
        self._kind = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def record(
        self, generation: Generation, context: RequestContext, model: str, prompt_param: str, sampling: SamplingParams
    ) -> None:
        """The span of a generation that is over; a child of the client's, if it sent a traceparent."""
        epoch_s = time.time() - time.perf_counter()

        def at_ns(at_s: float) -> int:
            return round((epoch_s + at_s) * 1e9)

        operation = _OPERATIONS.get(prompt_param, "chat")
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._parent_of({"traceparent": context.traceparent}) if context.traceparent else None,
            kind=self._kind,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.response.id": context.request_id,
                **_request_attributes(model, sampling),
                **_response_attributes(model, generation),
            },
            start_time=at_ns(generation.start_time),
        )
        times = generation.samples[0].times
        for name, at_s in (("first step", times.begun), ("first token", times.first_token)):
            if not math.isnan(at_s):
                span.add_event(name, timestamp=at_ns(at_s))
        if generation.error is not None:
            span.set_status(self._failed)
            span.set_attribute("error.type", type(generation.error).__name__)
        span.end(end_time=at_ns(generation.end_time))

    def close(self) -> None:
        """Send what is left; takes some seconds at most."""
        self._provider.shutdown()


def tracer_of(endpoint: str | None) -> Tracer | None:
    """The tracer that sends to a collector (the URL of its OTLP/HTTP traces), None without one.

    Raises ConfigError if OpenTelemetry is not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: needs the OpenTelemetry packages: pip install 'toka[otel]' ({error})"
        ) from None
    return Tracer(provider_of(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)))


def provider_of(exporter: SpanExporter) -> TracerProvider:
    """A provider that names this service and hands spans to exporter from a thread of its own."""
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: PROVIDER_NAME}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _request_attributes(model: str, sampling: SamplingParams) -> Mapping[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": sampling.n,
    }
    if sampling.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if sampling.stop:
        attributes["gen_ai.request.stop_sequences"] = sampling.stop
    return attributes


def _response_attributes(model: str, generation: Generation) -> Mapping[str, Any]:
    start, times = generation.start_time, generation.samples[0].times
    attributes: dict[str, Any] = {
        "gen_ai.response.model": model,
        "gen_ai.response.finish_reasons": [sample.finish_reason or "error" for sample in generation.samples],
        "gen_ai.usage.input_tokens": sum(generation.num_prompt_tokens),
        "gen_ai.usage.output_tokens": sum(sample.num_tokens for sample in generation.samples),
        "gen_ai.latency.e2e": generation.end_time - start,
    }
    for name, seconds in (
        ("time_in_queue", times.begun - start),
        ("time_to_first_token", times.first_token - start),
        ("time_in_model_prefill", times.first_token - times.begun),
        ("time_in_model_decode", times.last_token - times.first_token),
    ):
        if not math.isnan(seconds):
            attributes[f"gen_ai.latency.{name}"] = seconds
    return attributes
