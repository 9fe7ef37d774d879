"""Fixtures of the server's tests: a server in a thread, answering from a fake engine in another."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fake_engine, running_server and byte_tokenizer lie beside the tests

from byte_tokenizer import save_byte_tokenizer
from fake_engine import Behaviour
from running_server import RunningServer

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
def start_server(tokenizer: Tokenizer) -> Iterator[StartServer]:
    """Starts servers of the test's own; all are stopped after it."""
    running: list[RunningServer] = []

    def start(behaviour: Behaviour | None = None, **flags: object) -> RunningServer:
        running.append(RunningServer(tokenizer, Config(**flags), behaviour or Behaviour()))
        return running[-1].__enter__()

    yield start
    for one in running:
        one.__exit__(None, None, None)
