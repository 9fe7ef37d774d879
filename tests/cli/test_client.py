"""`toka ping` and `toka chat` against a server that answers with canned streams."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from toka.cli import main


class _Handler(BaseHTTPRequestHandler):
    requests: list[tuple[str, dict[str, Any], str | None]]
    failure: bytes | None = None
    breaks_off = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append((self.path, body, self.headers["authorization"]))
        self.send_response(503 if self.failure else 200)
        self.send_header("content-type", "application/json" if self.failure else "text/event-stream")
        if self.breaks_off:
            self.send_header("content-length", "9999")  # and then the connection ends before
        self.end_headers()
        self.wfile.write(self.failure or self._stream(body))

    def _stream(self, body: dict[str, Any]) -> bytes:
        chunks: list[dict[str, Any]] = []
        is_chat = "messages" in body
        for index in range(body.get("n", 1)):
            for i, text in enumerate(("", "Hel", "lo")):
                delta: dict[str, Any] = {"content": text} | ({"role": "assistant"} if i == 0 else {})
                choice = {"delta": delta} if is_chat else {"text": text}
                chunks.append({"choices": [{"index": index, "finish_reason": None, **choice}]})
        if "stream_options" in body:
            usage = {"prompt_tokens": 1, "completion_tokens": 2 * body.get("n", 1), "total_tokens": 3}
            chunks.append({"choices": [], "usage": usage})
        return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def handler() -> Iterator[type[_Handler]]:
    class Handler(_Handler):
        requests: list[tuple[str, dict[str, Any], str | None]] = []  # noqa: RUF012

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Handler.port = server.server_port  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Handler
        server.shutdown()
        thread.join()


def test_ping_prints_text_and_figures(handler: type[_Handler], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", f"port={handler.port}", "prompt=hi there", "max_tokens=9", "temperature=0.5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Hello\n")
    assert "2 tokens, " in out
    assert "tokens/s" in out
    assert "time to first token" in out
    path, body, _ = handler.requests[0]
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["temperature"], body["model"]) == ("hi there", 9, 0.5, "default")


def test_ping_without_a_prompt_has_one(handler: type[_Handler]) -> None:
    assert main(["ping", f"port={handler.port}"]) == 0
    assert handler.requests[0][1]["prompt"]


def test_ping_as_chat_with_a_key(
    handler: type[_Handler], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKA_API_KEY", "from-environment")
    assert main(["ping", f"port={handler.port}", "chat=T", "prompt=hi"]) == 0
    assert main(["ping", f"port={handler.port}", "chat=T", "prompt=hi", "api_key=given"]) == 0
    assert capsys.readouterr().out.startswith("Hello\n")
    assert handler.requests[0][0] == "/v1/chat/completions"
    assert handler.requests[0][1]["messages"] == [{"role": "user", "content": "hi"}]
    assert [request[2] for request in handler.requests] == ["Bearer from-environment", "Bearer given"]


def test_ping_hides_the_text_and_keeps_samples_apart(
    handler: type[_Handler], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ping", f"port={handler.port}", "hide=T"]) == 0
    assert "Hello" not in capsys.readouterr().out
    assert main(["ping", f"port={handler.port}", "n=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- 0\nHello\n--- 1\nHello\n")
    assert "4 tokens" in out


def test_ping_tells_what_the_server_says(handler: type[_Handler], capsys: pytest.CaptureFixture[str]) -> None:
    handler.failure = b'{"error": {"message": "The engine is warming up."}}'
    assert main(["ping", f"port={handler.port}"]) == 1
    assert "the server answered 503" in (error := capsys.readouterr().err)
    assert "warming up" in error


@pytest.mark.parametrize("command", ["ping", "chat"])
def test_a_connection_lost_in_mid_stream_is_one_line(
    handler: type[_Handler], command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(_Handler, "_stream", lambda *_: b'data: {"choices": []}\n\n' if command == "ping" else b"")
    handler.breaks_off = True
    assert main([command, f"port={handler.port}"]) == 1
    assert "was lost" in capsys.readouterr().err


def test_chat_remembers_what_was_said(
    handler: type[_Handler], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["chat", f"port={handler.port}", "system=be brief"]) == 0
    assert capsys.readouterr().out == "Hello\nHello\n"
    assert [message["content"] for message in handler.requests[1][1]["messages"]] == ["be brief", "one", "Hello", "two"]
