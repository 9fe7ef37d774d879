"""Models, tokenization, health, metrics, authentication, request ids and the OpenAPI description."""

from __future__ import annotations

import re
import subprocess
import sys

import openai
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.server.schemas import NEUTRAL_VALUES, ChatCompletionRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]


def test_models(server: RunningServer) -> None:
    assert [model.id for model in server.openai.models.list()] == ["default", "tiny-bytes"]
    assert server.openai.models.retrieve("tiny-bytes").id == "tiny-bytes"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("other/model")


def test_tokenize_and_detokenize_as_lm_eval_asks(server: RunningServer) -> None:
    """lm-evaluation-harness 0.4.13, RemoteTokenizer: probes these and takes the first id of the special tokens' text."""
    info = server.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<eos>", "<bos>")
    assert "messages" in info["chat_template"]
    tokens = server.post("/tokenize", {"prompt": "test", "add_special_tokens": False}).json()["tokens"]
    assert tokens == list(b"test")
    assert server.post("/tokenize", {"prompt": "<eos>", "add_special_tokens": False}).json()["tokens"] == [257]
    assert server.post("/detokenize", {"tokens": [*"é".encode(), 257]}).json() == {"prompt": "é<eos>"}


def test_tokenize_says_more(server: RunningServer) -> None:
    reply = server.post("/tokenize", {"model": "tiny-bytes", "prompt": "ab", "return_token_strs": True}).json()
    assert reply == {"count": 2, "max_model_len": 2000, "tokens": [97, 98], "token_strs": ["a", "b"]}
    chat = server.post("/tokenize", {"messages": HI}).json()["tokens"]
    assert bytes(chat) == b"[user]hi\n[assistant]"


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": "a", "messages": HI}, {"prompt": "a", "x": 1}])
def test_tokenize_refuses(server: RunningServer, body: dict) -> None:
    assert server.post("/tokenize", body).status_code == 400


@pytest.mark.parametrize("tokens", [[-1], [258], ["a"], 5, [1.5], None])
def test_detokenize_refuses(server: RunningServer, tokens: object) -> None:
    reply = server.post("/detokenize", {"tokens": tokens})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")


def test_health_ready_version(server: RunningServer) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", server.get("/version").json()["version"])


def test_metrics(start_server) -> None:
    server = start_server()
    server.openai.completions.create(model="default", prompt="abc", max_tokens=5, n=2)
    server.openai.completions.create(model="default", prompt="abc", max_tokens=5, stop="b")
    text = server.get("/metrics").text
    for line in (
        'toka:num_requests_running{model_name="tiny-bytes"} 0.0',
        'toka:num_requests_waiting{model_name="tiny-bytes"} 0.0',
        'toka:kv_cache_usage_perc{model_name="tiny-bytes"} 0.25',
        'toka:prompt_tokens_total{model_name="tiny-bytes"} 10.0',
        'toka:prefix_cache_queries_total{model_name="tiny-bytes"} 10.0',
        'toka:prefix_cache_hits_total{model_name="tiny-bytes"} 4.0',
        'toka:num_preemptions_total{model_name="tiny-bytes"} 0.0',
        'toka:compiles_after_ready_total{model_name="tiny-bytes"} 0.0',
        'toka:startup_seconds{phase="compile"} 1.5',
        'toka:request_success_total{finished_reason="length",model_name="tiny-bytes"} 2.0',
        'toka:request_success_total{finished_reason="stop",model_name="tiny-bytes"} 1.0',
        'toka:time_to_first_token_seconds_count{model_name="tiny-bytes"} 3.0',
        'toka:e2e_request_latency_seconds_count{model_name="tiny-bytes"} 2.0',
    ):
        assert line in text.splitlines(), line
    tokens = re.search(r'toka:generation_tokens_total{model_name="tiny-bytes"} (\d+)', text)
    assert tokens is not None
    assert int(tokens.group(1)) >= 12
    latencies = re.search(r'toka:inter_token_latency_seconds_count{model_name="tiny-bytes"} (\d+)', text)
    assert latencies is not None
    assert int(latencies.group(1)) >= 9


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer right", 200), ("bearer right", 200), ("Bearer wrong", 401), ("right", 401), (None, 401),
     ("Bearer \xe9", 401)],
)  # fmt: skip
def test_the_api_key(start_server, authorization: str | None, status: int) -> None:
    server = start_server(Behaviour(), api_key="right")
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/nothing"):
        expected = 404 if status == 200 and path == "/nothing" else status
        assert server.get(path, headers=headers).status_code == expected, path
    reply = server.post("/v1/completions", {"prompt": "a"}, headers=headers)
    assert reply.status_code == status
    if status == 401:
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 200
    assert server.status_with_authorization("/v1/models", "Bearer ") == 401


def test_without_a_key_anything_goes(server: RunningServer) -> None:
    for authorization in ("Bearer ", "Bearer x", "Basic x"):
        assert server.status_with_authorization("/v1/models", authorization) == 200


def test_request_ids(server: RunningServer) -> None:
    assert server.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {server.get("/version").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    bad = server.get("/version", headers={"x-request-id": "a b\tc" + "x" * 500}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", bad)


def test_openapi_tells_the_fields_that_are_really_taken(server: RunningServer) -> None:
    spec = server.get("/openapi.json").json()
    for path, schema in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatCompletionRequest)):
        body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        component = spec["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
        assert set(component["properties"]) == {*schema.__struct_fields__, *NEUTRAL_VALUES[schema]}
        assert component["additionalProperties"] is False
    for reference in re.findall(r'"#/components/schemas/(\w+)"', server.get("/openapi.json").text):
        assert reference in spec["components"]["schemas"]


def test_the_server_does_not_import_torch_or_transformers() -> None:
    code = "import sys, toka.server.launch, toka.cli, toka.client.ping; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
