"""Keys, limits, CORS, TLS, logs, and what becomes of clients that leave or do not read."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.config import Config
from toka.errors import ConfigError
from toka.log import JsonFormatter, request_id
from toka.messages import Abort
from toka.server.keys import KeyRing
from toka.server.listener import check_certificate

COMPLETIONS = "/v1/completions"


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _stream_head(server: RunningServer, body: dict, headers: dict[str, str] | None = None) -> socket.socket:
    """A connection that has asked for a stream and not read anything."""
    data = json.dumps({"stream": True, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    connection.sendall("\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data)
    return connection


def _read_until(connection: socket.socket, words: bytes) -> bytes:
    """What comes, up to the piece that has these words."""
    received = b""
    while words not in received:
        data = connection.recv(65536)
        assert data, received
        received += data
    return received


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("# the team's\nalpha\n\n  beta  \n", encoding="utf-8")
    return str(path)


def test_every_key_of_the_file_and_the_admin_key_open_the_door(start_server, key_file: str) -> None:
    server = start_server(Behaviour(), api_key="gamma", api_key_file=key_file, admin_key="root")
    for key in ("alpha", "beta", "gamma", "root"):
        assert server.get("/v1/models", headers=_bearer(key)).status_code == 200, key
    for key in ("delta", "# the team's", "alph", "alphaa"):
        assert server.get("/v1/models", headers=_bearer(key)).status_code == 401, key


def test_anthropics_header_is_a_key_too(start_server) -> None:
    server = start_server(Behaviour(), api_key="alpha")
    assert server.get("/v1/models", headers={"x-api-key": "alpha"}).status_code == 200
    assert server.get("/v1/models", headers={"x-api-key": "beta"}).status_code == 401
    assert server.get("/v1/models", headers={"x-api-key": "alpha", **_bearer("beta")}).status_code == 401


def test_keys_beyond_ascii(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("schlüssel\n", encoding="utf-8")
    ring = KeyRing.of(Config(api_key_file=str(path)))
    assert ring.caller("schlüssel".encode().decode("latin-1")) is not None
    assert ring.caller("schlussel") is None


def test_owners_tell_keys_apart_and_nothing_of_them() -> None:
    ring = KeyRing(["alpha", "beta"], "root")
    owners = {ring.caller(key).owner for key in ("alpha", "beta", "root")}
    assert len(owners) == 3
    assert not any(key in owner for owner in owners for key in ("alpha", "beta", "root"))


@pytest.mark.parametrize("text", [None, "", "# nothing\n\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file"):
        KeyRing.of(Config(api_key_file=str(path)))


def test_metrics_for_the_admin_alone(start_server) -> None:
    server = start_server(Behaviour(), api_key="alpha", admin_key="root", admin_metrics=True)
    reply = server.get("/metrics", headers=_bearer("alpha"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "admin_only")
    assert server.get("/metrics", headers=_bearer("root")).status_code == 200
    assert server.get("/v1/models", headers=_bearer("alpha")).status_code == 200


def test_an_admin_key_alone_closes_nothing(start_server) -> None:
    server = start_server(Behaviour(), admin_key="root", admin_metrics=True)
    assert server.get("/v1/models").status_code == 200
    assert server.get("/metrics").status_code == 403


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"admin_metrics": True}, "admin_key"), ({"log_prompts": True}, "log_requests"), ({"tls_cert": "x"}, "tls_key"),
        ({"tls_key": "x"}, "tls_cert"), ({"cors_origins": "example.org"}, "cors_origins"), ({"max_n": 0}, "max_n"),
        ({"body_timeout_s": 0}, "body_timeout_s"), ({"slow_reader_timeout_s": float("nan")}, "slow_reader_timeout_s"),
        ({"max_queued_tokens": 0}, "max_queued_tokens"), ({"log_format": "xml"}, "log_format"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be(flags: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Config(**flags).check()


# --------------------------------------------------------------------------------------------------------------- abort


def test_abort_by_request_id_gives_the_client_what_there_is(start_server) -> None:
    server = start_server(Behaviour(step_s=0.01))
    with httpx.stream(
        "POST",
        server.url + COMPLETIONS,
        json={"prompt": "abc", "max_tokens": 1900, "stream": True, "n": 2},
        headers={"x-request-id": "mine"},
    ) as reply:
        lines = reply.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["id"] == "cmpl-mine"
        assert server.post("/v1/abort", {"request_id": "cmpl-mine"}).json() == {
            "request_id": "cmpl-mine",
            "num_aborted": 1,
        }
        rest = [line for line in lines if line]
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert reasons.count("abort") == 2
    assert rest[-1] == "data: [DONE]"
    server.wait(lambda: len(server.engine.aborted()) == 2)
    assert server.post("/v1/abort", {"request_id": "mine"}).status_code == 404
    assert (
        'toka:request_success_total{finished_reason="abort",model_name="tiny-bytes"} 2.0' in server.get("/metrics").text
    )


def test_abort_of_a_reply_that_is_not_streamed(start_server) -> None:
    server = start_server(Behaviour(step_s=0.01))
    connection = _stream_head(server, {"prompt": "abc", "max_tokens": 1900, "stream": False}, {"x-request-id": "mine"})
    server.wait(lambda: server.engine._num_tokens > 3)
    assert server.post("/v1/abort", {"request_id": "mine"}).status_code == 200
    _read_until(connection, b'"finish_reason":"abort"')
    connection.close()


def test_abort_while_the_prompt_is_still_scored_is_an_error_in_form(start_server) -> None:
    server = start_server(Behaviour(step_s=0.05, prompt_scores_per_step=1))
    body = {"prompt": "a" * 500, "max_tokens": 5, "echo": True, "logprobs": 1, "stream": False}
    connection = _stream_head(server, body, {"x-request-id": "mine"})
    server.wait(lambda: bool(server.engine.submitted()))
    assert server.post("/v1/abort", {"request_id": "mine"}).status_code == 200
    _read_until(connection, b'"code":"aborted"')
    connection.close()


def test_only_its_owner_and_the_admin_may_abort(start_server, key_file: str) -> None:
    server = start_server(Behaviour(step_s=0.01), api_key_file=key_file, admin_key="root")
    for owner, other, status in (("alpha", "beta", 404), ("alpha", "alpha", 200), ("beta", "root", 200)):
        connection = _stream_head(
            server, {"prompt": "a", "max_tokens": 1900}, {**_bearer(owner), "x-request-id": "mine"}
        )
        server.wait(lambda: server.serving.engine.num_open > 0)
        reply = server.post("/v1/abort", {"request_id": "mine"}, headers=_bearer(other))
        assert reply.status_code == status, (owner, other)
        connection.close()
        server.wait(lambda: server.serving.engine.num_open == 0)


# -------------------------------------------------------------------------------------------------------------- limits


def _refused(reply: httpx.Response, status: int) -> dict:
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def test_limits_on_one_request(start_server) -> None:
    server = start_server(Behaviour(), max_body_bytes=2000, max_prompt_tokens=10, max_n=2)
    assert _refused(server.post(COMPLETIONS, {"prompt": "a" * 3000}), 413)["code"] == "request_too_large"
    assert _refused(server.post(COMPLETIONS, {"prompt": "a" * 11}), 400)["param"] == "prompt"
    assert _refused(server.post(COMPLETIONS, {"prompt": "a", "n": 3}), 400)["param"] == "n"
    assert server.post(COMPLETIONS, {"prompt": "a" * 10, "n": 2, "max_tokens": 2}).status_code == 200


def test_requests_at_once_are_bounded(start_server) -> None:
    server = start_server(Behaviour(step_s=0.01), max_concurrent_requests=2)
    connections = [_stream_head(server, {"prompt": "a", "max_tokens": 1900}) for _ in range(2)]
    server.wait(lambda: server.serving.engine.num_open == 2)
    reply = server.get("/v1/models")
    assert _refused(reply, 429)["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    assert server.get("/health").status_code == 200
    for connection in connections:
        connection.close()
    server.wait(lambda: server.get("/v1/models").status_code == 200)


def test_queued_tokens_are_bounded(start_server) -> None:
    server = start_server(Behaviour(step_s=0.5), max_queued_tokens=100)
    assert _refused(server.post(COMPLETIONS, {"prompt": "a" * 101}), 400)["param"] == "prompt"
    connection = _stream_head(server, {"prompt": "a" * 60, "max_tokens": 5, "n": 3})
    server.wait(lambda: server.serving.engine.num_open == 3)
    assert server.serving.engine.num_queued_tokens == 60  # the three samples' prompt is one
    reply = server.post(COMPLETIONS, {"prompt": "a" * 60, "max_tokens": 1})
    assert "60 of 100" in _refused(reply, 429)["message"]
    assert reply.headers["x-should-retry"] == "true"
    server.wait(lambda: server.serving.engine.num_queued_tokens == 0)  # their first tokens are there
    connection.close()


def test_queued_tokens_are_given_back_when_the_client_leaves(start_server) -> None:
    server = start_server(Behaviour(step_s=1.0), max_queued_tokens=100)
    connection = _stream_head(server, {"prompt": "a" * 60, "max_tokens": 5})
    server.wait(lambda: server.serving.engine.num_queued_tokens == 60)
    connection.close()
    server.wait(lambda: server.serving.engine.num_queued_tokens == 0)


def test_a_body_that_does_not_arrive_is_a_408(start_server) -> None:
    server = start_server(Behaviour(), body_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
        assert _read_until(connection, b"body_timeout").startswith(b"HTTP/1.1 408")


# ------------------------------------------------------------------------------------------------------ CORS and TLS


def test_cors_for_the_origins_named(start_server) -> None:
    server = start_server(Behaviour(), cors_origins="https://a.example, https://b.example", api_key="alpha")
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST",
                 "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    reply = httpx.options(server.url + COMPLETIONS, headers=preflight)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
    refused = server.post(COMPLETIONS, {"prompt": "a"}, headers={"origin": "https://b.example"})
    assert refused.status_code == 401  # the page may read why
    assert refused.headers["access-control-allow-origin"] == "https://b.example"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    other = server.get("/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_no_cors_unless_asked_for(server: RunningServer) -> None:
    assert "access-control-allow-origin" not in server.get("/health", headers={"origin": "https://a.example"}).headers


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: no certificate to test with")
    directory = tmp_path_factory.mktemp("tls")
    cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return cert, key


def test_https(start_server, certificate: tuple[str, str]) -> None:
    server = start_server(Behaviour(), tls_cert=certificate[0], tls_key=certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    url = server.url.replace("http:", "https:")
    with httpx.Client(verify=context, base_url=url) as client:
        assert client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 2}).json()["choices"][0]["text"] == "ab"
        with client.stream("POST", COMPLETIONS, json={"prompt": "abc", "max_tokens": 3, "stream": True}) as reply:
            assert [line for line in reply.iter_lines() if line][-1] == "data: [DONE]"
    with pytest.raises(httpx.HTTPError):
        server.get("/health")  # no plain HTTP beside it


def test_a_certificate_that_is_none(tmp_path: Path, certificate: tuple[str, str]) -> None:
    check_certificate(Config(tls_cert=certificate[0], tls_key=certificate[1]))
    with pytest.raises(ConfigError, match="tls_cert"):
        check_certificate(Config(tls_cert=certificate[1], tls_key=certificate[1]))
    with pytest.raises(ConfigError, match="nothing-there"):
        check_certificate(Config(tls_cert=str(tmp_path / "nothing-there"), tls_key=certificate[1]))


# ---------------------------------------------------------------------------------------------------------------- logs


def _logged(caplog: pytest.LogCaptureFixture, server: RunningServer, count: int) -> list[dict]:
    def records() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "toka.requests"]

    server.wait(lambda: len(records()) >= count)
    return [json.loads(JsonFormatter().format(record)) for record in records()]


def test_a_line_for_each_request_tells_its_tokens_and_times(start_server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toka")
    server = start_server(Behaviour(), log_requests=True)
    assert server.get("/metrics").status_code == 200  # not told: dashboards ask every few seconds
    secret = {"prompt": "the secret", "max_tokens": 3, "n": 2}
    server.post(COMPLETIONS, secret, headers={"x-request-id": "mine"})
    server.post(COMPLETIONS, {"prompt": "the secret", "max_tokens": -1})
    lines = _logged(caplog, server, 2)
    assert lines[0]["method"] == "POST"
    assert (lines[0]["path"], lines[0]["status"], lines[0]["level"]) == (COMPLETIONS, 200, "info")
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"], lines[0]["cached_tokens"]) == (10, 6, 3)
    assert lines[0]["finish_reasons"] == ["length", "length"]
    assert 0 <= lines[0]["queue_s"] <= lines[0]["ttft_s"] <= lines[0]["generation_s"] <= lines[0]["duration_s"]
    assert lines[0]["message"].endswith("(mine)")
    assert (lines[1]["status"], "prompt_tokens" in lines[1]) == (400, False)
    assert "secret" not in json.dumps(lines)


def test_prompts_are_logged_only_if_asked_for(start_server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "toka")
    server = start_server(Behaviour(), log_requests=True, log_prompts=True)
    server.post(COMPLETIONS, {"prompt": "the secret", "max_tokens": 3})
    server.post(COMPLETIONS, content=b'{"prompt": "\xff\\ud800')
    lines = _logged(caplog, server, 2)
    assert json.loads(lines[0]["body"])["prompt"] == "the secret"
    assert lines[1]["status"] == 400


def test_json_lines_carry_the_request_id_and_the_traceback() -> None:
    token = request_id.set("mine")
    try:
        raise ValueError("lone \ud800 surrogate\nand a line")
    except ValueError as error:
        record = logging.LogRecord("toka.x", logging.ERROR, "f", 1, "went %s", ("wrong\n",), (type(error), error, None))
    line = JsonFormatter().format(record)
    request_id.reset(token)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["request_id"], fields["message"], fields["level"]) == ("mine", "went wrong\n", "error")
    assert "ValueError" in fields["exception"]
    record = logging.LogRecord("toka.x", logging.INFO, "f", 1, "idle", (), None)
    assert "request_id" not in json.loads(JsonFormatter().format(record))


# -------------------------------------------------------------------------------------------------- gone and stuck clients


def test_when_a_client_leaves_the_engine_hears_of_it_within_two_steps(start_server) -> None:
    server = start_server(Behaviour(step_s=0.25))
    connection = _stream_head(server, {"prompt": "abc", "max_tokens": 1900, "n": 2})
    server.wait(lambda: server.engine._num_steps >= 2)
    steps = server.engine._num_steps
    connection.close()
    server.wait(lambda: any(isinstance(message, Abort) for message in list(server.engine.received)))
    assert server.engine._num_steps - steps <= 2
    assert not server.engine._rows


def test_a_client_that_reads_nothing_is_cut_off_by_the_kernel(start_server) -> None:
    """Too few tokens wait for it to make the server's own bound end it."""
    server = start_server(
        Behaviour(reply=lambda submit, _: [97] * 4000, max_request_tokens=5000), slow_reader_timeout_s=1.0
    )
    connection = socket.socket()
    connection.settimeout(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # before connecting, or it has no effect
    connection.connect(("127.0.0.1", server.port))
    body = {"prompt": "abc", "max_tokens": 4000, "stream": True, "logprobs": 20}  # more than a socket's buffer takes
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    answered = f'toka:http_requests_total{{handler="{COMPLETIONS}",method="POST"'
    server.wait(lambda: answered in server.get("/metrics").text, timeout_s=20)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    assert b"[DONE]" not in received
    assert server.serving.engine.num_open == 0
    connection.close()
