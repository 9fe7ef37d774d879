"""Prometheus metrics (floor 0). Names follow vLLM's, under `toka:`, so that its dashboards need only the prefix changed.

What the engine counts is read from its last statistics when Prometheus asks; what a client feels (latencies, finishes) is
observed by the server as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)


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


def kv_cache_usage(stats: EngineGauges) -> float:
    """Share of the KV blocks that requests hold, 0..1."""
    return 1.0 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


class _EngineCollector(Collector):
    def __init__(
        self, model_name: str, stats: Callable[[], EngineGauges], startup_s: Callable[[], Mapping[str, float]]
    ):
        self._model_name, self._stats, self._startup_s = model_name, stats, startup_s

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
        startup = GaugeMetricFamily("toka:startup_seconds", "Duration of each warmup phase.", labels=["phase"])
        for phase, seconds in self._startup_s().items():
            startup.add_metric([phase], seconds)
        yield startup


class Metrics:
    """The metrics of one server, in a registry of its own.

    stats, startup_s: asked at each scrape for the engine's latest statistics and the seconds per warmup phase.
    """

    def __init__(
        self, model_name: str, stats: Callable[[], EngineGauges], startup_s: Callable[[], Mapping[str, float]]
    ):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, stats, startup_s))
        ProcessCollector(registry=self.registry)
        self._model_name = model_name
        self.time_to_first_token_s = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _TTFT_BUCKETS_S
        )
        self.inter_token_latency_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sample.", _ITL_BUCKETS_S
        )
        self.e2e_request_latency_s = self._histogram(
            "e2e_request_latency_seconds", "From the request to the end of its last sample.", _E2E_BUCKETS_S
        )
        self._success = Counter(
            "toka:request_success",
            "Samples that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"toka:{name}", help, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self._model_name)

    def count_finish(self, reason: str) -> None:
        """Count one sample that ended so: stop, length, abort or error."""
        self._success.labels(self._model_name, reason).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
