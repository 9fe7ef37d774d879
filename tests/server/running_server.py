"""A whole server in this process: uvicorn in one thread, a fake engine in another, real sockets between all."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

import httpx
import openai
import uvicorn
from fake_engine import Behaviour, FakeEngine

from toka.config import Config
from toka.server.app import create_app
from toka.server.engine_client import EngineClient
from toka.server.serving import Serving
from toka.text.tokenizer import Tokenizer


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield


class RunningServer:
    """Use as a context manager. url: http://127.0.0.1:PORT. engine: the fake. serving: the server's state."""

    def __init__(self, tokenizer: Tokenizer, config: Config, behaviour: Behaviour):
        self.engine = FakeEngine(behaviour)
        self._tokenizer, self._config = tokenizer, config
        self._directory = tempfile.mkdtemp(prefix="toka-test-")
        self._stop_engine = threading.Event()
        self._started = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RunningServer:
        addresses = (f"ipc://{self._directory}/in", f"ipc://{self._directory}/out")
        self._server_thread = threading.Thread(target=lambda: asyncio.run(self._serve(*addresses)))
        self._engine_thread = threading.Thread(target=self.engine.run, args=(*addresses, self._stop_engine))
        self._server_thread.start()
        self._engine_thread.start()
        assert self._started.wait(10)
        if self.engine.behaviour.fatal is None and not self.engine.behaviour.warm_s:
            self.wait(lambda: self.serving.engine.ready is not None)
        return self

    async def _serve(self, address_in: str, address_out: str) -> None:
        client = EngineClient(address_in, address_out)
        client.start()
        self.loop = asyncio.get_running_loop()
        self.serving = Serving(self._config, "tiny-bytes", self._tokenizer, client)
        app = create_app(self.serving)
        self._uvicorn = _Uvicorn(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
        self._started.set()
        await self._uvicorn.serve(sockets=[self._listener])
        await self.serving.grammars.close()
        await client.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uvicorn.should_exit = True
        self._stop_engine.set()
        self._server_thread.join(15)
        self._engine_thread.join(15)
        shutil.rmtree(self._directory, ignore_errors=True)

    def call(self, function: Callable[[], None]) -> None:
        """Run function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    @property
    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def post(self, path: str, body: object = None, **kwargs: object) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return httpx.post(self.url + path, timeout=20, **kwargs)

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **kwargs)

    def status_with_authorization(self, path: str, authorization: str) -> int:
        """Status of a GET with that header, word for word (httpx would refuse to send some)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers={"authorization": authorization})
        return connection.getresponse().status

    @staticmethod
    def wait(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Return once holds() is true; fail after timeout_s."""
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.005)
