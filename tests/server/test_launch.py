"""The whole server as processes: start, drain, forced stop, the engine's death, the parent's death."""

from __future__ import annotations

import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import openai
import psutil
import pytest
from served_process import Served

StartProcess = Callable[..., Served]


def _gone(process: psutil.Process, timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_sigterm_lets_running_streams_end_and_refuses_new_ones(start_process: StartProcess) -> None:
    served = start_process({"step_s": 0.02})
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


def test_draining_is_bounded(start_process: StartProcess) -> None:
    served = start_process({"step_s": 0.02}, drain_timeout_s=0.5)
    served.until_status("/ready", 200)
    stream = served.stream_in_background(1900)
    served.process.send_signal(signal.SIGTERM)
    assert served.ends() == 0
    assert "shutting down" in str(stream())


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start_process: StartProcess, second: signal.Signals) -> None:
    served = start_process({"step_s": 0.02})
    served.until_status("/ready", 200)
    engine = served.engine()
    stream = served.stream_in_background(1900)
    served.process.send_signal(signal.SIGTERM)
    served.until_status("/ready", 503)
    served.process.send_signal(second)
    assert served.ends(5) == 128 + second
    assert isinstance(stream(), openai.APIError)
    assert _gone(engine)


def test_a_signal_during_the_warmup_stops_at_once(start_process: StartProcess) -> None:
    served = start_process({"warm_s": 60})
    served.until_status("/health", 503)
    engine = served.engine()
    served.process.send_signal(signal.SIGINT)
    assert served.ends(5) == 0
    assert _gone(engine)


def test_when_the_engine_dies_the_process_says_so_and_exits_non_zero(start_process: StartProcess) -> None:
    served = start_process({"step_s": 0.02})
    served.until_status("/health", 200)
    stream = served.stream_in_background(1900)
    served.engine().kill()
    served.until_status("/health", 503)
    assert "engine process has ended" in str(stream())
    assert served.ends() == 1
    assert "engine process has ended" in served.log


@pytest.mark.parametrize(("config_error", "status"), [(True, 2), (False, 1)])
def test_an_engine_that_cannot_start_gives_its_reason(
    start_process: StartProcess, config_error: bool, status: int
) -> None:
    served = start_process({"fatal": {"message": "no such tensor", "config_error": config_error}})
    assert served.ends() == status
    [line] = served.log.splitlines()
    assert line.endswith("no such tensor")
    assert line.startswith("toka: error: ") == config_error


def test_the_engine_follows_its_parent(start_process: StartProcess) -> None:
    served = start_process({"step_s": 0.02})
    served.until_status("/ready", 200)
    engine = served.engine()
    served.process.kill()
    assert _gone(engine)


def test_nothing_is_left_in_the_temporary_directory(start_process: StartProcess, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for kill in (signal.SIGTERM, signal.SIGKILL):
        served = start_process()
        served.until_status("/ready", 200)
        assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o700]
        engine = served.engine()
        served.process.send_signal(kill)
        served.ends()
        assert _gone(engine)
        assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_one_line_and_status_2(start_process: StartProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        served = start_process(port=taken.getsockname()[1])
        assert served.ends() == 2
    assert served.log.startswith("toka: error: cannot listen on 127.0.0.1:")


def test_the_server_answers_soon_after_its_start(start_process: StartProcess) -> None:
    began = time.monotonic()
    start_process({"warm_s": 30}).until_status("/version", 200)
    assert time.monotonic() - began < 10  # about one second on an idle machine; tests run on busy ones


@pytest.mark.parametrize("flag", ["data_dir", "api_key_file", "tls_cert"])
def test_a_path_that_cannot_be_used_is_one_line_and_status_2(
    start_process: StartProcess, tmp_path: Path, flag: str
) -> None:
    (tmp_path / "empty").touch()
    more = {"tls_key": str(tmp_path / "empty")} if flag == "tls_cert" else {}
    served = start_process({}, **{flag: str(tmp_path / "empty"), **more})
    assert served.ends() == 2
    [line] = [line for line in served.log.splitlines() if line.strip()]
    assert line.startswith(f"toka: error: {flag}=")


def test_the_limit_of_open_files_is_raised(start_process: StartProcess) -> None:
    """Many systems begin with 1,024, which is fewer than the connections that a server may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        served = start_process({})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    served.until_status("/ready", 200)
    assert psutil.Process(served.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (min(hard, 65536), hard)
