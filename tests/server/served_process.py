"""A whole server as processes, with the fake engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

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
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
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
