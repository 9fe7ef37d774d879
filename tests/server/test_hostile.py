"""Sixty and more bodies that no decent client sends, and connections that end at every point: all get an answer in form, fast, and harm
nobody else."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.config import Config
from toka.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TIMEOUT_S = 10.0
MIB = 2**20


@pytest.fixture(scope="module")
def attacked(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all of it. At the end it must still be there, idle and well."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    with RunningServer(tokenizer, Config(data_dir=data_dir, body_timeout_s=2.0), Behaviour(step_s=0.002)) as server:
        yield server
        server.wait(lambda: server.serving.engine.num_open == 0)
        assert server.serving.engine.num_queued_tokens == 0
        assert server.get("/health").status_code == 200
        assert server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 2}).json()["choices"][0]["text"] == "ab"


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "abc", "max_tokens": 3, **fields}).encode()


def _chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **fields}).encode()


CATASTROPHIC = "(((a+)+)+)+" * 20 + "$"

BODIES: list[tuple[str, bytes]] = [
    # prompts
    (COMPLETIONS, _completion(prompt=[])),
    (COMPLETIONS, _completion(prompt=[[]])),
    (COMPLETIONS, _completion(prompt="")),
    (COMPLETIONS, _completion(prompt=["", "a"])),
    (COMPLETIONS, _completion(prompt=[258])),
    (COMPLETIONS, _completion(prompt=[-1])),
    (COMPLETIONS, _completion(prompt=[2**31, 2**63, 2**64])),
    (COMPLETIONS, _completion(prompt=[10**400])),
    (COMPLETIONS, _completion(prompt=[1.0])),
    (COMPLETIONS, _completion(prompt=[True, False])),
    (COMPLETIONS, _completion(prompt=[[97], "a", 5])),
    (COMPLETIONS, _completion(prompt=[[[97]]])),
    (COMPLETIONS, _completion(prompt="a" * (10 * MIB))),
    (COMPLETIONS, _completion(prompt=[97] * 1_000_000)),
    (COMPLETIONS, _completion(prompt=[[97]] * 100_000)),
    (COMPLETIONS, _completion(prompt=["a"] * 5000)),
    (COMPLETIONS, b'{"prompt": "\\ud800", "max_tokens": 2}'),
    (COMPLETIONS, b'{"prompt": "\\udc00\\ud800 tail", "max_tokens": 2}'),
    (COMPLETIONS, _completion(prompt="\x00\x01\x7f\ufeff\u202e")),
    (COMPLETIONS, _completion(prompt="e" + "\u0301" * 1900)),
    (COMPLETIONS, _completion(prompt="<eos><bos><eos>" * 50)),
    # numbers
    (COMPLETIONS, _completion(n=0)),
    (COMPLETIONS, _completion(n=-(2**63))),
    (COMPLETIONS, _completion(n=10**9)),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'),
    (COMPLETIONS, b'{"prompt": "a", "temperature": -Infinity}'),
    (COMPLETIONS, b'{"prompt": "a", "temperature": 1e99999}'),
    (COMPLETIONS, b'{"prompt": "a", "top_p": -0.0}'),
    (COMPLETIONS, b'{"prompt": "a", "top_p": 5e-324, "max_tokens": 2}'),
    (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}"),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": 1e3}'),
    (COMPLETIONS, _completion(max_tokens=2**62)),
    (COMPLETIONS, _completion(max_tokens=-5)),
    (COMPLETIONS, _completion(min_tokens=10, max_tokens=3)),
    (COMPLETIONS, _completion(logprobs=10**6)),
    (COMPLETIONS, _completion(deadline_s=1e-300)),
    (COMPLETIONS, _completion(priority=-(10**30))),
    # strings that stop, and names
    (COMPLETIONS, _completion(stop=[CATASTROPHIC])),
    (COMPLETIONS, _completion(stop=["a" * 1024] * 32, prompt="a" * 1800)),
    (COMPLETIONS, _completion(stop=["", None])),
    (COMPLETIONS, _completion(stop_token_ids=list(range(-8, 8)))),
    (COMPLETIONS, _completion(model="../../etc/passwd\x00")),
    (COMPLETIONS, _completion(cache_salt="s" * MIB)),
    (COMPLETIONS, _completion(session_id="\u0000" * 300)),
    (COMPLETIONS, _completion(user="u" * 5 * MIB)),
    (COMPLETIONS, _completion(**{"x" * MIB: 1})),
    (COMPLETIONS, b'{"prompt": "a", "prompt": [1], "prompt": null, "max_tokens": 2}'),
    # forms
    (COMPLETIONS, b"[" * MIB),
    (COMPLETIONS, b'{"a":' * 300_000 + b"1" + b"}" * 300_000),
    (COMPLETIONS, b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"),
    (COMPLETIONS, b"\xff\xfe" + _completion().decode().encode("utf-16-le")),
    (COMPLETIONS, _completion()[:-1]),
    (COMPLETIONS, _completion() + b"{}"),
    (COMPLETIONS, b"\x1f\x8b\x08\x00" + b"\x00" * 1000),
    (COMPLETIONS, b"prompt=a&max_tokens=2"),
    (COMPLETIONS, b"{" + b'"a": 1, ' * 200_000 + b'"prompt": "a"}'),
    # conversations
    (CHAT, _chat(messages=[])),
    (CHAT, _chat(messages=[{}])),
    (CHAT, _chat(messages=[{"role": "user", "content": None}] * 10_000)),
    (CHAT, _chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 50_000}])),
    (CHAT, _chat(messages=[{"role": "{{ 7*7 }}", "content": "{% for x in range(10**9) %}x{% endfor %}"}])),
    (CHAT, _chat(messages=[{"role": "user", "content": "\ud83d"}])),
    (CHAT, _chat(chat_template_kwargs={"messages": 5, "range": "x", "self": {}, "loop": []})),
    (CHAT, _chat(chat_template_kwargs={"a": [[[[]]]] * 10_000})),
    (CHAT, _chat(chat_template="{% for x in range(10**12) %}{{ x }}{% endfor %}")),
    (CHAT, _chat(top_logprobs=-1, logprobs=True)),
    (CHAT, _chat(stream=True, stream_options={"include_usage": "yes"})),
    # structured output and tools
    (CHAT, _chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": _nested(400)}})),
    (CHAT, _chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}})),
    (CHAT, _chat(structured_outputs={"regex": CATASTROPHIC})),
    (CHAT, _chat(structured_outputs={"regex": "a{1000000}{1000000}"})),
    (CHAT, _chat(structured_outputs={"grammar": "start: start start | " * 1000})),
    (CHAT, _chat(tools=[{"type": "function", "function": {"name": "f" * 10_000, "parameters": _nested(300)}}] * 50)),
    # the other routes
    ("/tokenize", json.dumps({"prompt": "a" * (10 * MIB)}).encode()),
    ("/tokenize", json.dumps({"messages": [{"role": "user", "content": "x"}], "prompt": "y"}).encode()),
    ("/detokenize", json.dumps({"tokens": [0] * 200_000}).encode()),
    ("/detokenize", json.dumps({"tokens": [-1, 2**70]}).encode()),
    ("/v1/abort", json.dumps({"request_id": "x" * MIB}).encode()),
    ("/v1/batches", json.dumps({"input_file_id": "../x", "endpoint": "/v1/../health", "completion_window": "1" * 10_000}).encode()),
    ("/v1/files", b"--x\r\n" * 10_000),
]  # fmt: skip


def test_there_are_at_least_sixty() -> None:
    assert len(BODIES) == len(set(BODIES)) >= 60


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{number}" for number in range(len(BODIES))])
def test_a_hostile_body(attacked: RunningServer, path: str, body: bytes) -> None:
    began = time.monotonic()
    headers = {"content-type": "application/json" if len(body) % 2 else "text/plain; charset=utf-7"}  # not looked at
    reply = httpx.post(attacked.url + path, content=body, headers=headers, timeout=TIMEOUT_S)
    assert reply.status_code < 500 and reply.status_code != 422, reply.text[:500]
    assert time.monotonic() - began < TIMEOUT_S
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(reply.content) < 2000


HEADERS = [
    b"content-length: 5\r\ncontent-length: 6\r\n",
    b"content-length: -1\r\n",
    b"content-length: 99999999999999999999\r\n",
    b"transfer-encoding: chunked\r\ncontent-length: 3\r\n",
    b"content-length: 2\r\nx-request-id: " + b"a" * 5000 + b"\r\n",
    b"content-length: 2\r\nauthorization: Bearer \xff\xfe\r\n",
    b"content-length: 2\r\ntraceparent: 00-zz-zz-zz\r\n",
    b"content-length: 2\r\n" + b"x: y\r\n" * 2000,
    b"content-length: 2\r\nexpect: 100-continue\r\n",
]


@pytest.mark.parametrize("head", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers(attacked: RunningServer, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", attacked.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + head + b"\r\n{}")
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            return  # hung up without a word, which is an answer too
    assert not received.startswith(b"HTTP/1.1 5"), received[:200]


@pytest.mark.parametrize("stream", [False, True])
def test_disconnects_at_every_point(attacked: RunningServer, stream: bool) -> None:
    """After each byte of the request (each seventh of the second kind), and after each of the first pieces of the reply."""
    body = _completion(max_tokens=50, stream=stream, prompt="abcdefgh")
    request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for sent in range(0, len(request) + 1, 1 if stream else 7):
        with socket.create_connection(("127.0.0.1", attacked.port), timeout=TIMEOUT_S) as connection:
            connection.sendall(request[:sent])
    for pieces in range(6 if stream else 3):
        with socket.create_connection(("127.0.0.1", attacked.port), timeout=TIMEOUT_S) as connection:
            connection.sendall(request)
            for _ in range(pieces):
                connection.recv(300)
    attacked.wait(lambda: attacked.serving.engine.num_open == 0)


def test_a_half_sent_body_is_not_waited_for_for_ever(attacked: RunningServer) -> None:
    connections = []
    for path in (COMPLETIONS, "/tokenize", "/v1/files", "/v1/batches"):
        connection = socket.create_connection(("127.0.0.1", attacked.port), timeout=TIMEOUT_S)
        form = path == "/v1/files"
        kind, begun = (b"multipart/form-data; boundary=b", b"--b\r\n") if form else (b"application/json", b"{")
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: %b\r\ncontent-length: 900\r\n\r\n" % (path.encode(), kind)
        connection.sendall(head + begun)
        connections.append(connection)
    for connection in connections:
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        connection.close()
