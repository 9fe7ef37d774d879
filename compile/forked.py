"""Calls spread over forked processes (floor 4).

Inductor keeps its state in globals and cannot compile two graphs in threads. A fork has everything that was imported and traced at hand,
at once and for nothing; a fresh process would spend five seconds on imports first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

from toka.errors import ConfigError

Call = Callable[[], None]


def is_possible(device_type: str) -> bool:
    """Whether this process may be forked: a CUDA context does not survive it, nor do macOS's system libraries."""
    return device_type == "cpu" and sys.platform == "linux"


def run_forked(calls: Sequence[Call], max_processes: int) -> Iterator[tuple[int, float]]:
    """Run every call in a child of its own, at most max_processes at a time; yields (index, seconds) as they end.

    What a call leaves must be files: nothing comes back but its error. Raises the ConfigError that a child raised, or a RuntimeError
    with the traceback of any other; children that still run are then killed.
    """
    waiting = list(enumerate(calls))[::-1]
    running: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < max_processes:
                    child = _Child(*waiting.pop())
                    running[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                for key, _ in selector.select():
                    child = running[key.fd]
                    if child.has_ended():
                        selector.unregister(key.fd)
                        del running[key.fd]
                        yield child.index, child.seconds()
        finally:
            for child in running.values():
                child.kill()


def run_in_turn(calls: Sequence[Call]) -> Iterator[tuple[int, float]]:
    """The same in this process, one call after another."""
    for index, call in enumerate(calls):
        began = time.perf_counter()
        call()
        yield index, time.perf_counter() - began


class _Child:
    """One call under way in a process of its own; `pipe` becomes readable when it has something to say or has ended."""

    def __init__(self, index: int, call: Call):
        self.index = index
        self._began = time.perf_counter()
        self._said = b""
        self.pipe, its_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _live(call, its_end)
        os.close(its_end)

    def has_ended(self) -> bool:
        """Read what there is."""
        part = os.read(self.pipe, 65536)
        self._said += part
        return not part

    def seconds(self) -> float:
        """Of the whole call. Raises what the call raised."""
        _, status = os.waitpid(self._pid, 0)
        os.close(self.pipe)
        if self._said:
            raise pickle.loads(self._said)  # written by our own child
        if status != 0:
            raise RuntimeError(f"a compiling process ended with {os.waitstatus_to_exitcode(status)}")
        return time.perf_counter() - self._began

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # a compiler that it runs ends by itself, within seconds
        os.waitpid(self._pid, 0)
        os.close(self.pipe)


def _live(call: Call, pipe: int) -> None:
    """A child's whole life; never returns."""
    error: BaseException | None = None
    try:
        call()
    except ConfigError as raised:
        error = raised
    except BaseException:
        error = RuntimeError(traceback.format_exc())
    with contextlib.suppress(BaseException):
        if error is not None:
            os.write(pipe, pickle.dumps(error))
    os._exit(0)
