"""Prometheus metrics (floor 0). Names follow vLLM's, under `toka:`, so that its dashboards need only the prefix changed.

What the engine counts is read from its last statistics when Prometheus asks; what a client feels (latencies, finishes) is
observed by the server as it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_PHASE_BUCKETS_S = (0.001, 0.005, 0.01, 0.05, *_E2E_BUCKETS_S)
_TOKEN_BUCKETS = tuple(float(scale * step) for scale in (1, 10, 100, 1000, 10_000, 100_000) for step in (1, 2, 5))
_SAMPLE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class EngineGauges(Protocol):
    """What the collector reads of the engine's statistics (`messages.EngineStats` has it)."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_free_blocks(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def cached_prompt_tokens_total(self) -> int: ...
    @property
    def generation_tokens_total(self) -> int: ...
    @property
    def preemptions_total(self) -> int: ...
    @property
    def compiles_after_ready_total(self) -> int: ...
    @property
    def num_steps_total(self) -> int: ...


class CacheFacts(NamedTuple):
    """The KV cache that the warmup made: sizes in tokens and blocks."""

    block_size: int
    num_blocks: int


class SampleTimes(NamedTuple):
    """The life of one sample, in seconds of time.perf_counter(); what did not happen is nan.

    arrival: of its request. begun: the engine planned its first step. first_token, last_token: when they came.
    """

    arrival: float
    begun: float
    first_token: float
    last_token: float


def kv_cache_usage(stats: EngineGauges) -> float:
    """Share of the KV blocks that requests hold, 0..1."""
    return 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


_CACHE_LABELS = ("model_name", "block_size", "num_gpu_blocks")  # the last is vLLM's name, whatever the device


class _EngineCollector(Collector):
    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineGauges],
        startup_s: Callable[[], Mapping[str, float]],
        cache: Callable[[], CacheFacts | None],
    ):
        self._model_name, self._stats, self._startup_s, self._cache = model_name, stats, startup_s, cache

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, help, value in (
            ("num_requests_running", "Requests in the engine's running batch.", stats.num_running),
            ("num_requests_waiting", "Requests that wait to be admitted.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV blocks in use, 0..1.", kv_cache_usage(stats)),
        ):
            gauge = GaugeMetricFamily(f"toka:{name}", help, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, help, count in (
            ("prompt_tokens", "Prompt tokens processed, cached ones included.", stats.prompt_tokens_total),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens_total),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens_total),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens_total),
            ("num_preemptions", "Requests put back to wait for want of KV blocks.", stats.preemptions_total),
            ("compiles_after_ready", "Compilations after the warmup: 0, or a bug.", stats.compiles_after_ready_total),
            ("engine_steps", "Steps the engine has run.", stats.num_steps_total),
        ):
            counter = CounterMetricFamily(f"toka:{name}", help, labels=["model_name"])
            counter.add_metric([self._model_name], count)
            yield counter
        if (cache := self._cache()) is not None:
            config = GaugeMetricFamily("toka:cache_config_info", "The KV cache.", labels=list(_CACHE_LABELS))
            config.add_metric([self._model_name, str(cache.block_size), str(cache.num_blocks)], 1.0)
            yield config
        startup = GaugeMetricFamily("toka:startup_seconds", "Duration of each warmup phase.", labels=["phase"])
        for phase, seconds in self._startup_s().items():
            startup.add_metric([phase], seconds)
        yield startup


class Metrics:
    """The metrics of one server, in a registry of its own.

    stats, startup_s, cache: asked at each scrape for the engine's latest statistics, the seconds per warmup phase and the KV cache
    (None before it is there).
    """

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineGauges],
        startup_s: Callable[[], Mapping[str, float]],
        cache: Callable[[], CacheFacts | None],
    ):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats, startup_s, cache))
        ProcessCollector(registry=self.registry)
        self._model_name = model_name
        self.time_to_first_token_s = self._histogram(
            "time_to_first_token_seconds", "From the request to a sample's first token.", _TTFT_BUCKETS_S
        )
        self.inter_token_latency_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sample.", _ITL_BUCKETS_S
        )
        self.e2e_request_latency_s = self._histogram(
            "e2e_request_latency_seconds", "From the request to the end of its last sample.", _E2E_BUCKETS_S
        )
        self._time_per_output_token_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a sample.", _ITL_BUCKETS_S
        )
        self._queue_s, self._prefill_s, self._decode_s, self._inference_s = (
            self._histogram(f"request_{phase}_time_seconds", help, _PHASE_BUCKETS_S)
            for phase, help in (
                ("queue", "From the request to a sample's first step."),
                ("prefill", "From a sample's first step to its first token."),
                ("decode", "From a sample's first token to its last."),
                ("inference", "From a sample's first step to its last token."),
            )
        )
        self._prompt_tokens, self._generation_tokens, self._max_tokens, self._num_samples = (
            self._histogram(name, help, buckets)
            for name, help, buckets in (
                ("request_prompt_tokens", "Tokens of a prompt.", _TOKEN_BUCKETS),
                ("request_generation_tokens", "Tokens generated for a sample.", _TOKEN_BUCKETS),
                ("request_params_max_tokens", "max_tokens, as asked for or resolved.", _TOKEN_BUCKETS),
                ("request_params_n", "Samples per prompt asked for.", _SAMPLE_BUCKETS),
            )
        )
        self._success = self._counter("request_success", "Samples that ended, by reason.", "finished_reason")
        self._http = Counter(
            "toka:http_requests",
            "HTTP requests answered; status 499: the client left before.",
            ["handler", "method", "status"],
            registry=self.registry,
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"toka:{name}", help, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self._model_name)

    def _counter(self, name: str, help: str, label: str) -> Counter:
        return Counter(f"toka:{name}", help, ["model_name", label], registry=self.registry)

    def observe_request(self, num_prompt_tokens: int, num_samples: int, max_tokens: int | None) -> None:
        """A prompt is handed to the engine."""
        self._prompt_tokens.observe(num_prompt_tokens)
        self._num_samples.observe(num_samples)
        if max_tokens is not None:
            self._max_tokens.observe(max_tokens)

    def observe_sample(self, reason: str, times: SampleTimes, num_tokens: int) -> None:
        """A sample ended so: stop, length, abort, expired or error. Phases that it did not get through count nowhere."""
        self._success.labels(self._model_name, reason).inc()
        self._generation_tokens.observe(num_tokens)
        for histogram, seconds in (
            (self._queue_s, times.begun - times.arrival),
            (self._prefill_s, times.first_token - times.begun),
            (self._decode_s, times.last_token - times.first_token),
            (self._inference_s, times.last_token - times.begun),
        ):
            if not math.isnan(seconds):
                histogram.observe(seconds)
        if num_tokens > 1:
            self._time_per_output_token_s.observe((times.last_token - times.first_token) / (num_tokens - 1))

    def count_http_request(self, handler: str, method: str, status: int) -> None:
        """handler: the route's path as written in the code, never as asked for."""
        self._http.labels(handler, method if method in _HTTP_METHODS else "other", str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
