"""What /metrics tells of requests that ended in every way, under vLLM's names; and the dashboard that shows it."""

from __future__ import annotations

import json
import re
from importlib import resources

import httpx
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.messages import FinishReason, Rejected

COMPLETIONS = "/v1/completions"

# vLLM's metrics of one engine without LoRA, speculation, KV transfer or several modalities (its page "Production Metrics"), less
# those of parts that toka has not.
VLLM_NAMES = {
    "cache_config_info",
    "e2e_request_latency_seconds",
    "generation_tokens_total",
    "inter_token_latency_seconds",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "num_requests_running",
    "num_requests_waiting",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "prompt_tokens_total",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_inference_time_seconds",
    "request_params_max_tokens",
    "request_params_n",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_success_total",
    "request_time_per_output_token_seconds",
    "time_to_first_token_seconds",
}


def _metrics(server: RunningServer) -> dict[str, float]:
    """Name and labels but model_name → value."""
    found = {}
    for line in server.get("/metrics").text.splitlines():
        if line.startswith("toka:"):
            series, _, value = line.rpartition(" ")
            series = re.sub(r',model_name="tiny-bytes"|model_name="tiny-bytes",?', "", series).replace("{}", "")
            found[series] = float(value)
    return found


def test_all_of_vllms_names_are_there(server: RunningServer) -> None:
    server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 2})
    names = {re.sub(r"_(bucket|sum|count)$", "", name.split("{")[0]) for name in _metrics(server)}
    assert {f"toka:{name}" for name in VLLM_NAMES} <= names


def test_the_phases_of_a_request(start_server) -> None:
    server = start_server(Behaviour(step_s=0.02))
    server.post(COMPLETIONS, {"prompt": ["abc", "de"], "max_tokens": 5, "n": 2})
    metrics = _metrics(server)
    assert metrics["toka:request_prompt_tokens_count"] == 2
    assert metrics["toka:request_prompt_tokens_sum"] == 5
    assert metrics["toka:request_params_n_sum"] == 4
    assert metrics["toka:request_params_max_tokens_sum"] == 10
    assert metrics["toka:request_generation_tokens_sum"] == 20
    for phase in ("queue", "prefill", "decode", "inference"):
        assert metrics[f"toka:request_{phase}_time_seconds_count"] == 4, phase
    seconds = {phase: metrics[f"toka:request_{phase}_time_seconds_sum"] for phase in ("prefill", "decode", "inference")}
    assert seconds["prefill"] >= 4 * 0.02
    assert seconds["decode"] >= 4 * 4 * 0.02
    assert seconds["prefill"] + seconds["decode"] == pytest.approx(seconds["inference"])
    assert metrics["toka:request_time_per_output_token_seconds_sum"] == pytest.approx(seconds["decode"] / 4)
    assert metrics['toka:cache_config_info{block_size="16",num_gpu_blocks="1000"}'] == 1


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (Behaviour(error_at_token=2), "error"),
        (Behaviour(error_at_token=0, error=FinishReason.EXPIRED), "expired"),
        (Behaviour(reject=lambda s: Rejected(request_id=s.request_id, message="no", param=None, status=400)), "error"),
    ],
)
def test_requests_that_fail_count_by_sample(start_server, behaviour: Behaviour, reason: str) -> None:
    server = start_server(behaviour)
    assert server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 5, "n": 2}).status_code in (400, 500, 503)
    metrics = _metrics(server)
    assert metrics[f'toka:request_success_total{{finished_reason="{reason}"}}'] == 2
    assert metrics["toka:e2e_request_latency_seconds_count"] == 0
    assert metrics.get("toka:request_decode_time_seconds_count") in (0, 2)


def test_requests_whose_client_left_count_as_aborted(start_server) -> None:
    server = start_server(Behaviour(step_s=0.05))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json={"prompt": "abc", "max_tokens": 1900, "n": 3}, timeout=0.4)
    server.wait(lambda: _metrics(server).get('toka:request_success_total{finished_reason="abort"}') == 3)
    assert _metrics(server)['toka:http_requests_total{handler="/v1/completions",method="POST",status="499"}'] == 1


def test_http_requests_are_counted_under_few_names(start_server) -> None:
    server = start_server()
    for path in ("/nothing/1", "/nothing/2", "/v1/models/none/such"):
        server.get(path)
    httpx.request("BREW", server.url + "/version")
    metrics = _metrics(server)
    assert metrics['toka:http_requests_total{handler="none",method="GET",status="404"}'] == 2
    assert metrics['toka:http_requests_total{handler="/v1/models/{model_id:path}",method="GET",status="404"}'] == 1
    assert not [name for name in metrics if "BREW" in name]


def test_the_dashboard_shows_only_metrics_that_exist(server: RunningServer) -> None:
    server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 2})
    there = {name.split("{")[0] for name in _metrics(server)}
    dashboard = json.loads(resources.files("toka.server").joinpath("dashboards/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"toka:\w+", query)}
    assert len(dashboard["panels"]) == len({panel["id"] for panel in dashboard["panels"]}) > 10
    assert shown
    assert shown <= there
