"""The engine as a child process: how it is started, watched and ended, and the first lines that run inside it.

The child leads a process group of its own, so that a Ctrl-C at the terminal reaches the server alone, which then decides, and so
that compilers the engine runs die with it. It learns of its parent's death by the end of its stdin, and follows at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from toka.config import Config, num_available_cores, set_engine_environment
from toka.errors import ConfigError
from toka.model_source import ModelSource

ENGINE_TARGET = "toka.engine.main:run"


class _Order(TypedDict):
    """What the child reads from its stdin first, as one line of JSON: enough to import torch and the engine."""

    target: str
    config: dict[str, object]


class _Place(TypedDict):
    """The second line."""

    source: dict[str, str]
    address_in: str
    address_out: str
    private_dir: str


class EngineProcess:
    """A running engine: it imports what it needs as soon as it is made, and works from `begin` on.

    target: `module:function`, called in the child as function(config, source, address_in, address_out).
    """

    def __init__(self, config: Config, target: str = ENGINE_TARGET):
        # -P: the working directory may be a checkout, whose top-level folders would shadow installed packages.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "toka.server.engine_process"], stdin=subprocess.PIPE, start_new_session=True
        )
        self._tell(_Order(target=target, config=dataclasses.asdict(config)))

    def begin(self, source: ModelSource, address_in: str, address_out: str, private_dir: str) -> None:
        """Let it load the model. private_dir: where the sockets are; the child removes it if it must do so in the parent's place."""
        fields = {key: str(value) for key, value in dataclasses.asdict(source).items()}
        self._tell(_Place(source=fields, address_in=address_in, address_out=address_out, private_dir=private_dir))

    def _tell(self, line: _Order | _Place) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; the watch tells
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, on_exit: Callable[[int], None]) -> None:
        """Call on_exit(status) once the process has ended, from a thread of its own."""
        threading.Thread(target=lambda: on_exit(self._process.wait()), name="engine-watch", daemon=True).start()

    def stop(self, patience_s: float) -> int:
        """Wait so long for the process to end by itself, then kill it and all it started. Returns its status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _main() -> int:
    """The child's first lines."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to a whole service; the parent drains, then ends us
        signal.signal(ignored, signal.SIG_IGN)
    order: _Order = json.loads(sys.stdin.buffer.readline())
    gc.disable()  # what a start makes stays; to search it for garbage again and again costs a sixth of it (see engine/main.py)
    module, _, function = order["target"].partition(":")
    try:
        config = Config(**order["config"])  # type: ignore[arg-type]
        set_engine_environment(
            config.num_threads or num_available_cores(), config.cache_path()
        )  # before torch is there
        run = getattr(importlib.import_module(module), function)
        line = sys.stdin.buffer.readline()
        if not line:
            return 0  # the parent has ended
        place: _Place = json.loads(line)
        threading.Thread(target=_follow_parent, args=(place["private_dir"],), name="parent-watch", daemon=True).start()
        run(config, _model_source(place["source"]), place["address_in"], place["address_out"])
    except ConfigError as error:
        print(f"toka: error: {error}", file=sys.stderr)
        return 2
    return 0


def _model_source(fields: dict[str, str]) -> ModelSource:
    paths = {name: Path(fields[name]) for name in ("path", "tokenizer_path")}
    return ModelSource(**{**fields, **paths})  # type: ignore[arg-type]


def _follow_parent(private_dir: str) -> None:
    while os.read(sys.stdin.fileno(), 1):  # empty when the parent has ended
        pass
    shutil.rmtree(private_dir, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_main())
