"""Clients that leave, clients that do not read, and the engine's death while they wait."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import openai
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

COMPLETIONS = "/v1/completions"


def _send(server: RunningServer, body: dict, receive_buffer_bytes: int = 65536) -> socket.socket:
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.settimeout(10)
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes
    )  # before connecting, or it has no effect
    connection.connect(("127.0.0.1", server.port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def _submitted_ids(server: RunningServer) -> set[int]:
    return {s.request_id + i for s in server.engine.submitted() for i in range(s.sampling.n)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted_at_once(start_server, stream: bool) -> None:
    server = start_server(Behaviour(step_s=0.01))
    connection = _send(server, {"prompt": "abc", "max_tokens": 1900, "n": 2, "stream": stream})
    server.wait(lambda: server.engine._num_tokens > 4)
    connection.close()
    server.wait(lambda: server.engine.aborted() == _submitted_ids(server), timeout_s=2)
    assert server.serving.engine.num_open == 0


def test_a_client_that_leaves_before_the_first_token_is_aborted(start_server) -> None:
    server = start_server(Behaviour(step_s=1.0))
    connection = _send(server, {"prompt": "abc", "max_tokens": 100, "stream": True})
    server.wait(lambda: bool(server.engine.submitted()))
    connection.close()
    server.wait(lambda: server.serving.engine.num_open == 0, timeout_s=2)


def test_half_a_request_and_then_nothing_harms_nobody(server: RunningServer) -> None:
    for part in (b"POST ", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(part)
    assert server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 1}).status_code == 200


def test_a_client_that_does_not_read_is_cut_off_and_aborted(start_server) -> None:
    server = start_server(
        Behaviour(reply=lambda submit, _: [97] * 300_000, max_request_tokens=400_000), max_queued_requests=8
    )
    connection = _send(server, {"prompt": "abc", "max_tokens": 300_000, "stream": True, "n": 4}, 4096)
    server.wait(lambda: server.engine.aborted() == _submitted_ids(server) != set(), timeout_s=60)
    assert server.serving.engine.num_open == 0
    assert server.post(COMPLETIONS, {"prompt": "abc", "max_tokens": 1}).status_code == 200
    connection.close()


def test_when_the_engine_dies_every_request_ends_with_an_error(start_server) -> None:
    server = start_server(Behaviour(step_s=0.01))
    outcomes: list[object] = []

    def ask(stream: bool) -> None:
        try:
            reply = server.openai.completions.create(model="default", prompt="a", max_tokens=1900, stream=stream)
            outcomes.append(list(reply) if stream else reply)
        except openai.APIError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True, True)]
    for thread in threads:
        thread.start()
    server.wait(lambda: len(server.engine.submitted()) == 3)
    server.wait(lambda: server.engine._num_tokens > 10)
    server.call(lambda: server.serving.engine.died("The engine process has ended (status 7)."))
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == 3
    assert all("status 7" in str(outcome) for outcome in outcomes)
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 503
    reply = server.post(COMPLETIONS, {"prompt": "a"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")


def test_while_draining_running_streams_go_on_and_new_requests_get_503(start_server) -> None:
    server = start_server(Behaviour(step_s=0.005))
    with server.openai.completions.create(model="default", prompt="abc", max_tokens=60, stream=True) as stream:
        first = next(iter(stream))
        server.serving.draining = True
        reply = server.post(COMPLETIONS, {"prompt": "a"})
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        assert len([first, *stream]) == 60


def test_before_ready_requests_get_503(start_server) -> None:
    server = start_server(Behaviour(warm_s=1.0))
    assert server.get("/ready").status_code == 503
    assert server.get("/health").status_code == 503
    reply = server.post(COMPLETIONS, {"prompt": "a"})
    assert (reply.status_code, reply.headers["x-should-retry"]) == (503, "true")
    assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
    server.wait(lambda: server.get("/ready").status_code == 200)
    assert server.get("/health").status_code == 200


def test_an_engine_that_hangs_is_not_healthy(start_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toka.server.health.MIN_HEALTH_TIMEOUT_S", 0.2)
    server = start_server(Behaviour(deaf_to_ping=True))
    started = time.monotonic()
    assert server.get("/health").status_code == 503
    assert time.monotonic() - started < 5


def test_keep_alive_connections_serve_one_request_after_another(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(3):
            assert client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 2}).status_code == 200
            with client.stream("POST", COMPLETIONS, json={"prompt": "abc", "max_tokens": 2, "stream": True}) as reply:
                assert list(reply.iter_lines())[-2] == "data: [DONE]"
