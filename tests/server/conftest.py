"""Fixtures of the server's tests: a server in a thread, answering from a fake engine in another."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fake_engine, running_server and others lie beside the tests

from byte_tokenizer import save_byte_tokenizer
from fake_engine import Behaviour
from running_server import RunningServer
from scripted_chat import TEMPLATE
from served_process import Served

from toka.config import Config
from toka.text.tokenizer import Tokenizer

StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_tokenizer(tmp_path_factory.mktemp("byte-model"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    """A server whose engine repeats the prompt; shared by tests that leave nothing behind."""
    with RunningServer(tokenizer, Config(), Behaviour()) as running:
        yield running


@pytest.fixture
def start_chat_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers with a chat template (and special tokens, and more of tokenizer_config.json) of the test's own."""
    running: list[RunningServer] = []

    def start(
        behaviour: Behaviour, template: str = TEMPLATE, marks: Sequence[str] = (), settings: Any = None, **flags: object
    ) -> RunningServer:
        directory = tmp_path / str(len(running))
        directory.mkdir()
        tokenizer = Tokenizer.load(save_byte_tokenizer(directory, template, marks, **(settings or {})))
        running.append(RunningServer(tokenizer, Config(**flags), behaviour))
        return running[-1].__enter__()

    yield start
    for one in running:
        one.__exit__(None, None, None)


@pytest.fixture
def start_server(tokenizer: Tokenizer) -> Iterator[StartServer]:
    """Starts servers of the test's own; all are stopped after it."""
    running: list[RunningServer] = []

    def start(behaviour: Behaviour | None = None, **flags: object) -> RunningServer:
        running.append(RunningServer(tokenizer, Config(**flags), behaviour or Behaviour()))
        return running[-1].__enter__()

    yield start
    for one in running:
        one.__exit__(None, None, None)


@pytest.fixture
def model_dir(tokenizer_dir: Path) -> Path:
    """A directory that passes for a model: configuration, tokenizer, and a safetensors file nobody reads."""
    (tokenizer_dir / "config.json").write_text('{"eos_token_id": 257}')
    (tokenizer_dir / "model.safetensors").write_bytes(b"")
    return tokenizer_dir


@pytest.fixture
def start_process(model_dir: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers as processes; all are killed after the test."""
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
