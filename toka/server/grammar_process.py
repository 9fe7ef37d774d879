"""The process that tries out grammars from requests, each in a fork of its own.

A grammar of a stranger may take long, much memory, or more stack than there is. None of that can be stopped within a process; a fork
can be killed, and what dies in it is one grammar. The forks have the vocabulary at hand, which takes most of a second to make, and are
started in a few milliseconds. Only what passed here is handed to the engine, which gives the same work more stack.

Orders come as lines of JSON on stdin, the first of which describes the vocabulary, verdicts go to stdout in the same form. The end of
stdin ends the process.
"""

from __future__ import annotations

import os
import resource
import selectors
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import psutil

from toka.errors import ConfigError, RequestError
from toka.params import StructuredOutput
from toka.server.grammar_checker import Order, Verdict, Vocabulary
from toka.text.grammar import GrammarVocabulary, lark_of

MAX_CPU_S = 0.5  # of one grammar; what takes more is too complex
MAX_WALL_S = 10.0  # after which nobody waits for the verdict any more: the machine is busy with other things
_WATCH_S = 0.05  # how often forks are looked at
MAX_FORKS = 2  # others wait
_NICENESS = 10  # of forks: who generates goes first
_MAX_MEMORY_BYTES = 2**30  # that a fork may have beyond its parent's
_TRIED_CHOICES = 16  # of a text
_STACK_BYTES = 2**20  # an eighth of what the engine's threads have
_READ_BYTES = 2**16


@dataclass
class _Fork:
    number: int
    process: psutil.Process
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
                self._end_slow_forks()
        finally:
            for fork in self._forks.values():
                fork.process.kill()

    def _take_events(self) -> bool:
        for key, _ in self._selector.select(_WATCH_S if self._forks else None):
            data = os.read(key.fd, _READ_BYTES)
            if key.fd == sys.stdin.fileno():
                if not data:
                    return False
                self._take_orders(data)
            elif data:
                self._forks[key.fd].said += data
            else:
                self._take_answer(key.fd)
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
        self._forks[answers] = _Fork(order.number, psutil.Process(pid), time.monotonic() + MAX_WALL_S)

    def _answer(self, order: Order, answer_to: int) -> None:
        """In the fork: try the grammar on a thread with little stack. What it says as it dies is for nobody."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
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
                grammar = StructuredOutput("lark", lark_of(order.source))
            else:
                grammar = StructuredOutput(order.kind, order.source)
            text = self._vocabulary.compile(grammar)
        except RequestError as error:
            return Verdict(order.number, error.message)
        text.try_out(_TRIED_CHOICES)  # what is slow behind the first token shows here
        if text.error is not None:
            return Verdict(order.number, f"The grammar is too complex: {text.error}")
        return Verdict(order.number, None, grammar.source if order.kind == "grammar" else None)

    def _end_slow_forks(self) -> None:
        now = time.monotonic()
        for pipe, fork in list(self._forks.items()):
            spent = fork.process.cpu_times()
            if spent.user + spent.system > MAX_CPU_S:
                error = f"The grammar is too complex: it takes more than {MAX_CPU_S} s to compile."
                self._end(pipe, Verdict(fork.number, error))
            elif fork.deadline_s <= now:
                self._end(pipe, None)

    def _take_answer(self, pipe: int) -> None:
        """The fork has ended, with or without an answer."""
        fork = self._forks[pipe]
        try:
            verdict = msgspec.json.decode(bytes(fork.said), type=Verdict)
        except msgspec.DecodeError:
            error = "The grammar is too complex: it takes too much memory or nests too deeply."
            verdict = Verdict(fork.number, error)
        self._end(pipe, verdict)

    def _end(self, pipe: int, verdict: Verdict | None) -> None:
        """Be done with a fork; verdict: what is to be said of its grammar, None = nobody waits for that."""
        fork = self._forks.pop(pipe)
        self._selector.unregister(pipe)
        os.close(pipe)
        fork.process.kill()
        os.waitpid(fork.process.pid, 0)
        if verdict is not None:
            sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
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
