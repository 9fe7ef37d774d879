"""The whole server as processes: start, drain, forced stop, the engine's death, the parent's death."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

_PROGRAM = """
import sys
from toka.config import Config
from toka.errors import ConfigError
from toka.server.engine_process import EngineProcess
from toka.server.launch import serve
try:
    config = Config(**eval(sys.argv[1])).check()
    sys.exit(serve(config, EngineProcess(config, "fake_engine:run")))
except ConfigError as error:
    print(f"toka: error: {error}", file=sys.stderr)
    sys.exit(2)
"""


class Served:
    """A `serve` process. url; process; log: what it wrote to stderr, once it has ended."""

    def __init__(self, model: Path, behaviour: dict[str, Any], flags: dict[str, Any]):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = flags.pop("port", None) or probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent),
            "FAKE_ENGINE": json.dumps(behaviour),
        }
        command = [sys.executable, "-c", _PROGRAM, repr({"model": str(model), "port": port, **flags})]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def until_status(self, path: str, status: int, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while True:
            try:
                if httpx.get(self.url + path, timeout=5).status_code == status:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end, f"{path} never said {status}"
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)

    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        [engine] = [child for child in children if "toka.server.engine_process" in child.cmdline()]
        return engine

    def ends(self, timeout_s: float = 15.0) -> int:
        return self.process.wait(timeout_s)

    @property
    def log(self) -> str:
        return self.process.stderr.read()

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def stream_in_background(self, max_tokens: int) -> Callable[[], str | openai.APIError]:
        """Begin a stream; the function returned waits for its end and gives the text or the error."""
        outcome: list[str | openai.APIError] = []
        begun = threading.Event()

        def read() -> None:
            text = ""
            try:
                for chunk in self.openai.completions.create(
                    model="default", prompt="abc", max_tokens=max_tokens, stream=True
                ):
                    text += chunk.choices[0].text
                    begun.set()
            except openai.APIError as error:
                outcome.append(error)
            else:
                outcome.append(text)

        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(10)

        def result() -> str | openai.APIError:
            thread.join(20)
            return outcome[0]

        return result


@pytest.fixture
def model_dir(tokenizer_dir: Path) -> Path:
    """A directory that passes for a model: configuration, tokenizer, and a safetensors file nobody reads."""
    (tokenizer_dir / "config.json").write_text('{"eos_token_id": 257}')
    (tokenizer_dir / "model.safetensors").write_bytes(b"")
    return tokenizer_dir


@pytest.fixture
def start(model_dir: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def begin(behaviour: dict[str, Any] | None = None, **flags: Any) -> Served:
        started.append(Served(model_dir, behaviour or {}, flags))
        return started[-1]

    yield begin
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait()
        served.process.stderr.close()


def _gone(process: psutil.Process, timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_sigterm_lets_running_streams_end_and_refuses_new_ones(start: Callable[..., Served]) -> None:
    served = start({"step_s": 0.02})
    served.until_status("/ready", 200)
    engine = served.engine()
    stream = served.stream_in_background(100)
    served.process.send_signal(signal.SIGTERM)
    served.until_status("/ready", 503)
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        served.openai.completions.create(model="default", prompt="a")
    assert stream() == "abc" * 33 + "a"
    assert served.ends() == 0
    assert _gone(engine)


def test_draining_is_bounded(start: Callable[..., Served]) -> None:
    served = start({"step_s": 0.02}, drain_timeout_s=0.5)
    served.until_status("/ready", 200)
    stream = served.stream_in_background(1900)
    served.process.send_signal(signal.SIGTERM)
    assert served.ends() == 0
    assert "shutting down" in str(stream())


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start: Callable[..., Served], second: signal.Signals) -> None:
    served = start({"step_s": 0.02})
    served.until_status("/ready", 200)
    engine = served.engine()
    stream = served.stream_in_background(1900)
    served.process.send_signal(signal.SIGTERM)
    served.until_status("/ready", 503)
    served.process.send_signal(second)
    assert served.ends(5) == 128 + second
    assert isinstance(stream(), openai.APIError)
    assert _gone(engine)


def test_a_signal_during_the_warmup_stops_at_once(start: Callable[..., Served]) -> None:
    served = start({"warm_s": 60})
    served.until_status("/health", 503)
    engine = served.engine()
    served.process.send_signal(signal.SIGINT)
    assert served.ends(5) == 0
    assert _gone(engine)


def test_when_the_engine_dies_the_process_says_so_and_exits_non_zero(start: Callable[..., Served]) -> None:
    served = start({"step_s": 0.02})
    served.until_status("/health", 200)
    stream = served.stream_in_background(1900)
    served.engine().kill()
    served.until_status("/health", 503)
    assert "engine process has ended" in str(stream())
    assert served.ends() == 1
    assert "engine process has ended" in served.log


@pytest.mark.parametrize(("config_error", "status"), [(True, 2), (False, 1)])
def test_an_engine_that_cannot_start_gives_its_reason(
    start: Callable[..., Served], config_error: bool, status: int
) -> None:
    served = start({"fatal": {"message": "no such tensor", "config_error": config_error}})
    assert served.ends() == status
    [line] = served.log.splitlines()
    assert line.endswith("no such tensor")
    assert line.startswith("toka: error: ") == config_error


def test_the_engine_follows_its_parent(start: Callable[..., Served]) -> None:
    served = start({"step_s": 0.02})
    served.until_status("/ready", 200)
    engine = served.engine()
    served.process.kill()
    assert _gone(engine)


def test_nothing_is_left_in_the_temporary_directory(start: Callable[..., Served], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for kill in (signal.SIGTERM, signal.SIGKILL):
        served = start()
        served.until_status("/ready", 200)
        assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o700]
        engine = served.engine()
        served.process.send_signal(kill)
        served.ends()
        assert _gone(engine)
        assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line_and_status_2(start: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        served = start(port=taken.getsockname()[1])
        assert served.ends() == 2
    assert served.log.startswith("toka: error: cannot listen on 127.0.0.1:")


def test_the_server_answers_soon_after_its_start(start: Callable[..., Served]) -> None:
    began = time.monotonic()
    start({"warm_s": 30}).until_status("/version", 200)
    assert time.monotonic() - began < 10  # about one second on an idle machine; tests run on busy ones
