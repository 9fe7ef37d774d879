"""The process that tries out grammars from requests, each in a fork of its own.

A grammar of a stranger may take long, much memory, or more stack than there is. None of that can be stopped within a process; a fork
can be killed, and what dies in it is one grammar. The forks have the vocabulary at hand, which takes most of a second to make, and are
started in a few milliseconds. Only what passed here is handed to the engine, which gives the same work more stack.

Orders come as lines of JSON on stdin, the first of which describes the vocabulary, verdicts go to stdout in the same form. The end of
stdin ends the process.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import psutil

from toka.errors import ConfigError, RequestError
from toka.params import StructuredOutput
from toka.text.grammar import GrammarVocabulary, lark_of

MAX_CHECK_S = 0.7
MAX_FORKS = 2  # others wait; a fork's time begins with it
_NICENESS = 10  # of forks: who generates goes first
_MAX_MEMORY_BYTES = 2**30  # that a fork may have beyond its parent's
_STACK_BYTES = 2**20  # an eighth of what the engine's threads have
_READ_BYTES = 2**16


class Vocabulary(msgspec.Struct):
    """The first line: see GrammarVocabulary."""

    tokenizer_json: str
    eos_token_ids: list[int]
    vocab_size: int


class Order(msgspec.Struct):
    """A grammar to try. kind "grammar": Lark's notation or GBNF's."""

    number: int
    kind: Literal["json_schema", "regex", "lark", "grammar"]
    source: str


class Verdict(msgspec.Struct):
    """error: what is wrong with it, None if nothing is. source: in Lark's notation, of a grammar that came in another."""

    number: int
    error: str | None
    source: str | None = None


@dataclass
class _Fork:
    number: int
    pid: int
    deadline_s: float
    said: bytearray = field(default_factory=bytearray)


class _Checker:
    """vocabulary: or why there is none, which then is what is wrong with every grammar."""

    def __init__(self, vocabulary: GrammarVocabulary | ConfigError):
        self._vocabulary = vocabulary
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._unread = bytearray()
        self._waiting: deque[Order] = deque()
        self._forks: dict[int, _Fork] = {}  # by the pipe that they answer through

    def serve(self, read: bytes) -> None:
        """Until stdin ends. read: what was read of it already."""
        self._take_orders(read)
        try:
            while True:
                while self._waiting and len(self._forks) < MAX_FORKS:
                    self._start(self._waiting.popleft())
                if not self._take_events():
                    return
                self._end_late_forks()
        finally:
            for fork in self._forks.values():
                os.kill(fork.pid, signal.SIGKILL)

    def _take_events(self) -> bool:
        deadlines = [fork.deadline_s for fork in self._forks.values()]
        timeout_s = max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None
        for key, _ in self._selector.select(timeout_s):
            data = os.read(key.fd, _READ_BYTES)
            if key.fd == sys.stdin.fileno():
                if not data:
                    return False
                self._take_orders(data)
            elif data:
                self._forks[key.fd].said += data
            else:
                self._end(key.fd)
        return True

    def _take_orders(self, data: bytes) -> None:
        self._unread += data
        *lines, rest = self._unread.split(b"\n")
        self._unread = rest
        self._waiting += [msgspec.json.decode(line, type=Order) for line in lines]

    def _start(self, order: Order) -> None:
        answers, answer_to = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._answer(order, answer_to)
            finally:
                os._exit(0)
        os.close(answer_to)
        self._selector.register(answers, selectors.EVENT_READ)
        self._forks[answers] = _Fork(order.number, pid, time.monotonic() + MAX_CHECK_S)

    def _answer(self, order: Order, answer_to: int) -> None:
        """In the fork: try the grammar on a thread with little stack."""
        os.nice(_NICENESS)
        limit_bytes = psutil.Process().memory_info().vms + _MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        threading.stack_size(_STACK_BYTES)
        verdicts: list[Verdict] = []
        thread = threading.Thread(target=lambda: verdicts.append(self._try(order)))
        thread.start()
        thread.join()
        data = msgspec.json.encode(verdicts[0]) if verdicts else b""
        while data:
            data = data[os.write(answer_to, data) :]

    def _try(self, order: Order) -> Verdict:
        if isinstance(self._vocabulary, ConfigError):
            return Verdict(order.number, f"{self._vocabulary}.")
        try:
            if order.kind == "grammar":
                source = lark_of(order.source)
                self._vocabulary.compile(StructuredOutput("lark", source))
                return Verdict(order.number, None, source)
            self._vocabulary.compile(StructuredOutput(order.kind, order.source))
        except RequestError as error:
            return Verdict(order.number, error.message)
        return Verdict(order.number, None)

    def _end_late_forks(self) -> None:
        now = time.monotonic()
        for pipe, fork in list(self._forks.items()):
            if fork.deadline_s <= now:
                os.kill(fork.pid, signal.SIGKILL)
                fork.said = bytearray()
                self._end(pipe, f"The grammar is too complex: it took longer than {MAX_CHECK_S} s to compile.")

    def _end(
        self, pipe: int, error: str = "The grammar is too complex: it took too much memory or nests too deeply."
    ) -> None:
        """The fork has answered, or has ended without an answer for this reason."""
        fork = self._forks.pop(pipe)
        self._selector.unregister(pipe)
        os.close(pipe)
        os.waitpid(fork.pid, 0)
        said = bytes(fork.said)
        with contextlib.suppress(msgspec.DecodeError):
            msgspec.json.decode(said, type=Verdict)
            return _say(said)
        return _say(msgspec.json.encode(Verdict(fork.number, error)))


def _say(verdict: bytes) -> None:
    sys.stdout.buffer.write(verdict + b"\n")
    sys.stdout.buffer.flush()


def _main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to a whole service; the parent ends us
        signal.signal(ignored, signal.SIG_IGN)
    first = bytearray()
    while not first.endswith(b"\n"):
        data = os.read(sys.stdin.fileno(), _READ_BYTES)  # not buffered: what follows is read from the same descriptor
        if not data:
            return
        first += data
    line, _, rest = first.partition(b"\n")
    described = msgspec.json.decode(line, type=Vocabulary)
    try:
        vocabulary = GrammarVocabulary(described.tokenizer_json, described.eos_token_ids, described.vocab_size)
    except ConfigError as error:
        _Checker(error).serve(bytes(rest))
    else:
        _Checker(vocabulary).serve(bytes(rest))


if __name__ == "__main__":
    _main()
