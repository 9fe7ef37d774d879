"""/v1/files and /v1/batches with the openai client: what is kept, what is run and how often, and what is refused."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import Behaviour
from running_server import RunningServer
from served_process import Served

from toka.errors import ConfigError
from toka.server.batch_runner import LEAST_PRIORITY
from toka.server.store import Store

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
def start_keeping(start_server, tmp_path: Path) -> Callable[..., RunningServer]:
    """Starts a server that keeps files."""
    return lambda behaviour=None, **flags: start_server(behaviour, data_dir=str(tmp_path / "data"), **flags)


def _line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "abc"} if url == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**asked, "max_tokens": 3, **body}}


def _jsonl(lines: list[Any]) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def _begin(client: openai.OpenAI, lines: list[Any], endpoint: str = COMPLETIONS, window: Any = "24h") -> str:
    file = client.files.create(file=("in.jsonl", _jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window).id


def _ended(client: openai.OpenAI, batch_id: str, timeout_s: float = 20.0) -> openai.types.Batch:
    ends = ("completed", "failed", "expired", "cancelled")
    RunningServer.wait(lambda: client.batches.retrieve(batch_id).status in ends, timeout_s)
    return client.batches.retrieve(batch_id)


def _outcomes(client: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({outcome["custom_id"] for outcome in found}) == len(found)
    return {outcome["custom_id"]: outcome for outcome in found}


# --------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_kept_told_of_and_forgotten(start_keeping) -> None:
    client = start_keeping().openai
    data = b'{"a": "\xc3\xa9"}\n' * 1000
    file = client.files.create(file=("../../etc/pass wd.jsonl", data), purpose="batch")
    assert (file.object, file.filename, file.bytes, file.purpose) == ("file", "pass wd.jsonl", len(data), "batch")
    assert abs(file.created_at - time.time()) < 60
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == data
    other = client.files.create(file=io.BytesIO(b"x"), purpose="batch")
    assert [one.id for one in client.files.list()] == [other.id, file.id]
    assert [one.id for one in client.files.list(order="asc", limit=1)] == [file.id, other.id]  # the client pages
    assert client.files.list(purpose="fine-tune").data == []
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    assert [one.id for one in client.files.list()] == [other.id]


@pytest.mark.parametrize(
    "file_id", ["../toka.sqlite", "..%2Ftoka.sqlite", "file-x", "%00", "'; DROP TABLE files", "a" * 5000]
)
def test_no_id_reaches_another_path(start_keeping, file_id: str) -> None:
    server = start_keeping()
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert server.get(path).status_code == 404


def test_uploads_are_bounded(start_keeping, tmp_path: Path) -> None:
    server = start_keeping(max_file_bytes=200_000, max_stored_bytes=300_000)
    client = server.openai
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a", b"x" * 200_001), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    with pytest.raises(openai.APIStatusError):
        client.files.create(file=("a", b"x" * 3_000_000), purpose="batch")
    client.files.create(file=("a", b"x" * 200_000), purpose="batch")
    with pytest.raises(openai.APIStatusError, match="delete some") as caught:
        client.files.create(file=("b", b"x" * 150_000), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
    assert [path.stat().st_size for path in (tmp_path / "data" / "files").iterdir()] == [200_000]
    assert not list((tmp_path / "data" / "partial").iterdir())


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"), ("multipart/form-data", b""), (None, b""), (FORM, b""), (FORM, b"--b--"),
        (FORM, b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--b--"),
        (FORM, b"--b\r\nContent-Disposition: form-data; name=file; filename=f\r\n\r\nx\r\n--b--\r\n"),
        (FORM, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"), (FORM, b"\xff" * 100),
        (FORM, b"--b\r\nnonsense\r\n\r\nx\r\n--b--\r\n"),
        (FORM, b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\n" + b"x" * 3_000_000 + b"\r\n--b--\r\n"),
        (FORM, b"".join(b"--b\r\nContent-Disposition: form-data; name=x%d\r\n\r\nx\r\n" % i for i in range(50)) + b"--b--\r\n"),
    ],
)  # fmt: skip
def test_forms_that_are_none(start_keeping, content_type: str | None, body: bytes) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    reply = start_keeping().post("/v1/files", content=body, headers=headers)
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"purpose": "fine-tune"}, "purpose"), ({}, "purpose"),
     ({"purpose": "batch", "expires_after[seconds]": "5"}, "expires_after[seconds]")],
)  # fmt: skip
def test_what_an_upload_may_not_ask(start_keeping, fields: dict, param: str) -> None:
    reply = httpx.post(start_keeping().url + "/v1/files", data=fields, files={"file": ("f", b"x")})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=", "order=up", "before=file-1"])
def test_listings_refuse(start_keeping, query: str) -> None:
    reply = start_keeping().get(f"/v1/files?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])


def test_each_key_sees_its_own_and_the_admin_all(start_keeping, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha\nbeta\n")
    server = start_keeping(Behaviour(step_s=0.01), api_key_file=str(keys), admin_key="root")
    clients = {key: server.openai.with_options(api_key=key) for key in ("alpha", "beta", "root")}
    batch_id = _begin(clients["alpha"], [_line("a")])
    batch = _ended(clients["alpha"], batch_id)
    for key, sees in (("alpha", True), ("beta", False), ("root", True)):
        client = clients[key]
        assert bool(client.files.list().data) == bool(client.batches.list().data) == sees
        if not sees:
            for ask in (
                lambda client=client: client.files.content(batch.output_file_id),
                lambda client=client: client.files.delete(batch.input_file_id),
                lambda client=client: client.batches.retrieve(batch_id),
                lambda client=client: client.batches.cancel(batch_id),
                lambda client=client: client.batches.create(
                    input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    ask()


def test_without_a_data_directory_there_are_none(server: RunningServer) -> None:
    reply = server.get("/v1/files")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "files_not_configured")
    assert "data_dir" in server.post("/v1/batches", {"input_file_id": "x"}).json()["error"]["message"]


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_answers_every_line(start_keeping) -> None:
    server = start_keeping()
    client = server.openai
    lines = [_line(f"id-{i}", prompt=[97 + i], max_tokens=i + 1) for i in range(5)]
    lines.insert(2, b"\n")
    lines.append(_line("too-long", prompt="a" * 5000))
    lines.append(_line("unknown-field", never_heard_of=1))
    file = client.files.create(file=("in.jsonl", _jsonl(lines).rstrip(b"\n")), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h", metadata={"run": "7"}
    )
    assert (made.object, made.status, made.metadata, made.expires_at - made.created_at) == (
        "batch", "validating", {"run": "7"}, 86400,
    )  # fmt: skip
    batch = _ended(client, made.id)
    assert (batch.status, batch.request_counts.to_dict()) == ("completed", {"total": 7, "completed": 5, "failed": 2})
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answered = _outcomes(client, batch.output_file_id)
    assert list(answered) == [f"id-{i}" for i in range(5)]
    for i in range(5):
        response = answered[f"id-{i}"]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["text"] == chr(97 + i) * (i + 1)
        assert response["body"]["id"] == f"cmpl-{response['request_id']}"
        assert answered[f"id-{i}"]["error"] is None
    refused = _outcomes(client, batch.error_file_id)
    assert list(refused) == ["too-long", "unknown-field"]
    assert refused["unknown-field"]["response"]["status_code"] == 400
    assert refused["unknown-field"]["response"]["body"]["error"]["param"] == "never_heard_of"
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert {submit.priority for submit in server.engine.submitted()} == {LEAST_PRIORITY}
    assert [one.id for one in client.batches.list()] == [batch.id]


def test_a_batch_of_conversations(start_keeping) -> None:
    client = start_keeping().openai
    batch = _ended(client, _begin(client, [_line("a", CHAT), _line("b", CHAT, n=2)], CHAT))
    answered = _outcomes(client, batch.output_file_id)
    assert [len(answered[name]["response"]["body"]["choices"]) for name in ("a", "b")] == [1, 2]
    assert batch.error_file_id is None


def test_a_line_that_the_engine_cannot_end_is_an_error(start_keeping) -> None:
    client = start_keeping(Behaviour(error_at_token=1)).openai
    batch = _ended(client, _begin(client, [_line("a")]))
    assert batch.status == "completed"
    assert batch.output_file_id is None
    assert _outcomes(client, batch.error_file_id)["a"]["response"]["status_code"] == 500


def test_more_lines_than_the_server_has_room_for_all_come_through(start_keeping) -> None:
    server = start_keeping(Behaviour(step_s=0.005), max_queued_requests=3, batch_concurrency=8)
    client = server.openai
    batch = _ended(client, _begin(client, [_line(str(i)) for i in range(12)]), 60)
    assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}


def test_people_go_before_batches(start_keeping) -> None:
    server = start_keeping()
    client = server.openai
    _ended(client, _begin(client, [_line("a", priority=-5), _line("b", priority=2_000_000)]))
    assert sorted(submit.priority for submit in server.engine.submitted()) == [LEAST_PRIORITY, 2_000_000]


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([], ["empty_file"]),
        ([b"nonsense\n", _line("a")], ["invalid_json_line"]),
        ([_line("a"), b"\xff\n", b"[" * 100_000 + b"\n"], ["invalid_json_line"] * 2),
        ([_line("a"), _line("a")], ["duplicate_custom_id"]),
        ([_line("a", CHAT)], ["invalid_url"]),
        ([_line("a", stream=True)], ["invalid_request"]),
        ([{**_line("a"), "method": "GET"}, {**_line("b"), "body": 5}, {**_line("c"), "custom_id": None}, _line("")],
         ["invalid_json_line"] * 3 + ["invalid_request"]),
        ([_line(str(i)) for i in range(21)], ["too_many_requests"]),
    ],
)  # fmt: skip
def test_a_file_with_faults_fails_as_a_whole_and_runs_nothing(start_keeping, lines: list, codes: list[str]) -> None:
    server = start_keeping(max_batch_requests=20)
    batch = _ended(server.openai, _begin(server.openai, lines))
    assert batch.status == "failed"
    assert [error.code for error in batch.errors.data] == codes
    if codes[0] not in ("empty_file", "too_many_requests"):
        assert all(error.line for error in batch.errors.data)
    assert not server.engine.submitted()


@pytest.mark.parametrize(
    ("field", "value"),
    [("endpoint", "/v1/none"), ("endpoint", 5), ("completion_window", "soon"), ("completion_window", "15d"),
     ("completion_window", "0h"), ("metadata", {"a": 1}), ("metadata", {str(i): "x" for i in range(17)}),
     ("metadata", {"k": "x" * 513}), ("never_heard_of", 1), ("output_expires_after", {"seconds": 5})],
)  # fmt: skip
def test_what_a_batch_may_not_ask(start_keeping, field: str, value: object) -> None:
    server = start_keeping()
    file = server.openai.files.create(file=("f", b"{}"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h", field: value}
    reply = server.post("/v1/batches", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_a_batch_of_no_file_is_a_404(start_keeping) -> None:
    body = {"input_file_id": "file-x", "endpoint": COMPLETIONS, "completion_window": "24h"}
    reply = start_keeping().post("/v1/batches", body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "input_file_id")


def test_cancel_keeps_what_is_answered(start_keeping) -> None:
    server = start_keeping(Behaviour(step_s=0.02), batch_concurrency=2)
    client = server.openai
    batch_id = _begin(client, [_line(str(i), max_tokens=1 if i < 2 else 1000) for i in range(6)])
    server.wait(lambda: client.batches.retrieve(batch_id).request_counts.completed == 2)
    file_id = client.batches.retrieve(batch_id).input_file_id
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        client.files.delete(file_id)
    assert client.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    batch = _ended(client, batch_id)
    assert (batch.status, batch.request_counts.completed) == ("cancelled", 2)
    assert batch.cancelling_at <= batch.cancelled_at
    assert list(_outcomes(client, batch.output_file_id)) == ["0", "1"]
    server.wait(lambda: server.serving.engine.num_open == 0)
    assert len(server.engine.submitted()) == 4
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch_id)
    assert client.files.delete(file_id).deleted


def test_when_the_window_ends_the_rest_expires(start_keeping) -> None:
    server = start_keeping(Behaviour(step_s=0.02))
    client = server.openai
    batch = _ended(client, _begin(client, [_line("short", max_tokens=1), _line("long", max_tokens=1900)], window="2s"))
    assert batch.status == "expired"
    assert list(_outcomes(client, batch.output_file_id)) == ["short"]
    expired = _outcomes(client, batch.error_file_id)
    assert (list(expired), expired["long"]["error"]["code"]) == (["long"], "batch_expired")
    server.wait(lambda: server.serving.engine.num_open == 0)


def test_the_internal_fault_of_one_line_is_its_error(start_keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_keeping()
    submit = server.serving.submit

    def explode(fields: Any, *arguments: Any, **more: Any) -> Any:
        if fields.user == "explode":
            raise RuntimeError("the secret")
        return submit(fields, *arguments, **more)

    monkeypatch.setattr(server.serving, "submit", explode)
    client = server.openai
    batch = _ended(client, _begin(client, [_line("a", user="explode"), _line("b")]))
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 1, "failed": 1}
    assert "secret" not in client.files.content(batch.error_file_id).text


# -------------------------------------------------------------------------------------------------------------- restarts


def _results(data_dir: Path) -> int:
    with sqlite3.connect(data_dir / "toka.sqlite") as db:
        return db.execute("SELECT COUNT(*) FROM results").fetchone()[0]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_batch_survives_its_server(start_process: Callable[..., Served], tmp_path: Path, end: signal.Signals) -> None:
    """Finished lines are answered once: the replies' ids that the first server wrote are those of the output file."""
    flags = {"data_dir": str(tmp_path / "data"), "batch_concurrency": 2, "drain_timeout_s": 0.1}
    first = start_process({"step_s": 0.03}, **flags)
    first.until_status("/ready", 200)
    batch_id = _begin(first.openai, [_line(str(i), max_tokens=5) for i in range(12)])
    RunningServer.wait(lambda: _results(tmp_path / "data") >= 3)
    first.process.send_signal(end)
    first.ends()
    with sqlite3.connect(tmp_path / "data" / "toka.sqlite") as db:
        done = {
            json.loads(result)["custom_id"]: json.loads(result)["id"]
            for (result,) in db.execute("SELECT result FROM results")
        }
    assert 3 <= len(done) < 12
    (tmp_path / "data" / "files" / "file-left-behind").write_bytes(b"x")
    second = start_process({}, **flags)
    second.until_status("/ready", 200)
    batch = _ended(second.openai, batch_id)
    assert batch.request_counts.to_dict() == {"total": 12, "completed": 12, "failed": 0}
    answered = _outcomes(second.openai, batch.output_file_id)
    assert set(answered) == {str(i) for i in range(12)}
    assert {name: answered[name]["id"] for name in done} == done
    assert {path.name for path in (tmp_path / "data" / "files").iterdir()} == {
        batch.input_file_id,
        batch.output_file_id,
    }


def test_one_directory_serves_one_server(tmp_path: Path) -> None:
    store = Store(str(tmp_path), 1000)
    with pytest.raises(ConfigError, match="another toka server"):
        Store(str(tmp_path), 1000)
    store.close()
    Store(str(tmp_path), 1000).close()


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="data_dir"):
        Store(str(tmp_path / "file"), 1000)
    (tmp_path / "toka.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="data_dir"):
        Store(str(tmp_path), 1000)
