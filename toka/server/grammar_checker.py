"""Whether a request's grammar can be used: asked of a process of its own (grammar_process.py), off the event loop.

llguidance is imported there alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import sys
from collections import OrderedDict
from typing import Literal

import msgspec

from toka.errors import CapacityError, RequestError
from toka.params import MAX_GRAMMAR_BYTES, StructuredOutput
from toka.text.tokenizer import Tokenizer

MAX_WAIT_S = 10.0  # for a verdict, the process's start and the grammars before it included
MAX_WAITING = 64
_MAX_KNOWN = 256  # grammars that passed
_MAX_LINE_BYTES = 16 * 2**20  # verdicts have at most a converted grammar

GrammarKind = Literal["json_schema", "regex", "lark", "grammar"]


class Vocabulary(msgspec.Struct):
    """The first line that the process reads: see GrammarVocabulary."""

    tokenizer_json: str
    eos_token_ids: list[int]
    vocab_size: int


class Order(msgspec.Struct):
    """A grammar to try. kind "grammar": Lark's notation or GBNF's."""

    number: int
    kind: GrammarKind
    source: str


class Verdict(msgspec.Struct):
    """error: what is wrong with it, None if nothing is. source: of kind "grammar" what it is in Lark's notation, else None."""

    number: int
    error: str | None
    source: str | None = None


class GrammarChecker:
    """Checks grammars for one model. The process starts with the first of them, or by `start`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, asyncio.Future[Verdict]] = {}
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()  # by a hash of the grammar

    async def check(self, kind: GrammarKind, source: str, param: str, vocab_size: int) -> StructuredOutput:
        """The grammar as the engine takes it; kind "grammar": in Lark's notation or GBNF's. vocab_size: of the model.

        Raises RequestError naming param if it is wrong or takes too long, CapacityError if too many wait.
        """
        if len(source.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"{param}: a grammar can have {MAX_GRAMMAR_BYTES} bytes.", param, code="grammar_too_large"
            )
        verdict = await self._verdict(kind, source, vocab_size)
        if verdict.error is not None:
            raise RequestError(f"{param}: {verdict.error}", param, code="invalid_grammar")
        if kind == "grammar":
            assert verdict.source is not None
            return StructuredOutput("lark", verdict.source)
        return StructuredOutput(kind, source)

    async def _verdict(self, kind: GrammarKind, source: str, vocab_size: int) -> Verdict:
        key = hashlib.sha256(f"{kind} {source}".encode()).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        if len(self._open) >= MAX_WAITING:
            raise CapacityError("Too many grammars wait to be compiled.")
        number = next(self._numbers)
        answer = self._open[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                process = await self.start(vocab_size)
                assert process.stdin is not None
                process.stdin.write(msgspec.json.encode(Order(number, kind, source)) + b"\n")
                verdict: Verdict = await answer
        except (TimeoutError, ConnectionError):
            raise CapacityError("The grammar could not be compiled in time: the server is busy.", status=503) from None
        finally:
            del self._open[number]
        if verdict.error is None:
            self._known[key] = verdict
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return verdict

    async def start(self, vocab_size: int) -> asyncio.subprocess.Process:
        """The process, started if there is none."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                # -P: as for the engine's process, the working directory may be a checkout.
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "toka.server.grammar_process"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=_MAX_LINE_BYTES,
                )
                described = await asyncio.to_thread(self._described, vocab_size)
                assert self._process.stdin is not None and self._process.stdout is not None
                self._process.stdin.write(described + b"\n")
                self._reader = asyncio.create_task(self._read(self._process.stdout), name="grammar-reader")
            return self._process

    def _described(self, vocab_size: int) -> bytes:
        """The process's first line; megabytes of it."""
        tokenizer = self._tokenizer
        return msgspec.json.encode(Vocabulary(tokenizer.to_json(), list(tokenizer.eos_token_ids), vocab_size))

    async def _read(self, verdicts: asyncio.StreamReader) -> None:
        while line := await verdicts.readline():
            verdict = msgspec.json.decode(line, type=Verdict)
            if (answer := self._open.get(verdict.number)) is not None and not answer.done():
                answer.set_result(verdict)
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(ConnectionError("the process that checks grammars has ended"))

    async def close(self) -> None:
        """End the process."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
