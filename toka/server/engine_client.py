"""The API process's end of the line to the engine process: ZeroMQ, one task that reads, no thread.

Requests go down a PUSH socket, results come up a PULL socket; both are bound here, in a private directory. Everything the
engine says is taken in `_receive`: a step's arrays are spread over the samples they belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import secrets
import time
from collections.abc import Iterable, Sequence

import numpy as np
import zmq
import zmq.asyncio

from toka.errors import CapacityError, EngineDeadError, RequestError, TokaError
from toka.messages import (
    Abort,
    EngineStats,
    Fatal,
    Ping,
    Pong,
    Ready,
    Rejected,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
    pack_tokens,
)
from toka.params import SamplingParams
from toka.server.generation import Generation, Sample

logger = logging.getLogger("toka.server")

RETRY_AFTER_S = 5  # a restart or another replica may be there by then


class EngineClient:
    """Submits requests to the engine and hands its tokens to their samples.

    address_in: what the engine reads from. address_out: what it writes to. ready: its announcement once the warmup is over.
    num_queued_tokens: of prompts whose first token has not come. stats: its latest gauges. dead: why it is gone, or None.
    fatal: its last words, if it had any.
    """

    def __init__(self, address_in: str, address_out: str):
        self._context = zmq.asyncio.Context()
        self._down = self._context.socket(zmq.PUSH)
        self._up = self._context.socket(zmq.PULL)
        for socket, address in ((self._down, address_in), (self._up, address_out)):
            socket.set_hwm(0)  # admission bounds what is under way; a queue that drops would lose requests
            socket.bind(address)
        self._request_ids = itertools.count(1)
        self._nonces = itertools.count(1)
        self._samples: dict[int, tuple[Sample, Generation]] = {}
        self._queued_tokens: dict[int, int] = {}  # of prompts that wait, by their first sample's request id
        self.num_queued_tokens = 0
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.ready: Ready | None = None
        self.became_ready = asyncio.Event()
        self.stats = EngineStats()
        self.dead: EngineDeadError | None = None
        self.gone = asyncio.Event()  # set together with dead
        self.fatal: Fatal | None = None

    def start(self) -> None:
        """Begin to read; call it inside the event loop."""
        self._reader = asyncio.create_task(self._read(), name="engine-reader")

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        for socket in (self._down, self._up):
            socket.close(linger=0)
        self._context.term()

    @property
    def num_open(self) -> int:
        """Samples that have not ended."""
        return len(self._samples)

    async def wait_idle(self) -> None:
        """Return when no sample is open."""
        await self._idle.wait()

    def submit(
        self,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        stop_token_ids: tuple[int, ...],
        cache_salt: str = "",
        priority: int = 0,
        session_id: str = "",
        deadline_s: float = math.inf,
    ) -> None:
        """Send one Submit per prompt; the results go to generation.samples. deadline_s: seconds from the generation's start.

        Raises CapacityError (503) before the engine is ready, EngineDeadError after it died.
        """
        self._check_alive()
        if self.ready is None:
            raise CapacityError("The engine is warming up.", status=503, retry_after_s=RETRY_AFTER_S)
        samples = iter(generation.samples)
        for prompt, params in zip(prompts, sampling, strict=True):
            request_ids = [next(self._request_ids) for _ in range(params.n)]
            for request_id in request_ids:
                self._samples[request_id] = (next(samples), generation)
            generation.request_ids += request_ids
            self._queued_tokens[request_ids[0]] = len(prompt)
            self.num_queued_tokens += len(prompt)
            self._idle.clear()
            self._send(
                Submit(
                    request_id=request_ids[0],
                    prompt=pack_tokens(list(prompt)),
                    sampling=params,
                    stop_token_ids=stop_token_ids,
                    seed=secrets.randbits(62) if params.seed is None else params.seed,
                    cache_salt=cache_salt,
                    priority=priority,
                    session_id=session_id,
                    arrival_s=generation.start_time,
                    deadline_s=deadline_s,
                )
            )

    def abort(self, generation: Generation) -> None:
        """End what is still open of generation, for the reason "abort"; nothing happens if it is over."""
        self._abort_ids([request_id for request_id in generation.request_ids if request_id in self._samples])
        generation.abort()

    def _abort_ids(self, request_ids: list[int]) -> None:
        if request_ids:
            self._forget(request_ids)
            self._send(Abort(request_ids))

    def fail_all(self, error: TokaError) -> None:
        """End every open generation with error."""
        generations = {id(generation): generation for _, generation in self._samples.values()}
        self._abort_ids(list(self._samples))
        for generation in generations.values():
            generation.fail(error)

    async def ping(self, timeout_s: float) -> EngineStats:
        """Ask the engine's loop for a sign of life. Raises EngineDeadError if none comes in time."""
        self._check_alive()
        nonce = next(self._nonces)
        self._pongs[nonce] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(nonce))
            await asyncio.wait_for(self._pongs[nonce], timeout_s)
        except TimeoutError:
            raise EngineDeadError(f"The engine did not answer within {timeout_s:g} s.") from None
        finally:
            del self._pongs[nonce]
        return self.stats

    async def refresh_stats(self, timeout_s: float) -> EngineStats:
        """The engine's gauges of now or, if it does not answer in time, the last known ones."""
        if self.ready is not None:
            with contextlib.suppress(EngineDeadError):
                await self.ping(timeout_s)
        return self.stats

    def shutdown(self) -> None:
        """Ask the engine to leave."""
        if self.ready is not None:
            self._send(Shutdown())

    def died(self, reason: str) -> None:
        """The engine process is gone: end all that is open. Called by whoever watches the process."""
        if self.dead is None:
            self.dead = EngineDeadError(reason)
            self.gone.set()
            self.fail_all(self.dead)
            for pong in self._pongs.values():
                if not pong.done():
                    pong.set_exception(self.dead)

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise self.dead

    def _send(self, message: ToEngine) -> None:
        """Queue the message. It need not be awaited: the socket sends in order, as soon as the engine is connected."""
        if self.dead is None:
            self._down.send(encode(message))

    def _forget(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            self._samples.pop(request_id, None)
            self._leave_queue(request_id)
        if not self._samples:
            self._idle.set()

    def _leave_queue(self, request_id: int) -> None:
        self.num_queued_tokens -= self._queued_tokens.pop(request_id, 0)

    async def _read(self) -> None:
        while True:
            data = await self._up.recv()
            try:
                self._receive(decode_from_engine(data))
            except Exception:
                logger.exception("A message of the engine could not be handled.")

    def _receive(self, message: object) -> None:
        match message:
            case StepOutputs():
                self._spread(message)
            case Pong(nonce=nonce, stats=stats):
                self.stats = stats
                if (pong := self._pongs.get(nonce)) is not None and not pong.done():
                    pong.set_result(None)
            case Rejected():
                self._reject(message)
            case Ready():
                self.ready = message
                self.became_ready.set()
            case Fatal():
                self.fatal = message
                self.died(f"The engine has failed: {message.message}")

    def _spread(self, step: StepOutputs) -> None:
        now = time.perf_counter()
        self.stats = step.stats
        if step.prompt_scores is not None:
            for request_id, score in step.prompt_scores.entries():
                if (scored := self._samples.get(request_id)) is not None:
                    scored[0].take_prompt_score(score)
        if step.vectors:
            self._spread_vectors(step)
        # Where they are asked for, a request has one token a step.
        scores = {} if step.scores is None else dict(step.scores.entries())
        for request_id, begun_s in zip(
            np.frombuffer(step.begun, "<i8").tolist(), np.frombuffer(step.begun_s, "<f8").tolist(), strict=True
        ):
            if (begun := self._samples.get(request_id)) is not None:
                begun[0].begun_s = begun_s
        over: list[int] = []
        unwanted: list[int] = []  # what we end, not the engine
        for request_id, token_id, finish, num_cached in zip(
            np.frombuffer(step.request_ids, "<i8").tolist(),
            np.frombuffer(step.token_ids, "<i4").tolist(),
            step.finish,
            np.frombuffer(step.cached, "<i4").tolist(),
            strict=True,
        ):
            entry = self._samples.get(request_id)
            if entry is None:  # aborted (the engine had not heard of it yet), or ended by an entry before
                continue
            if self._queued_tokens:
                self._leave_queue(request_id)
            if entry[0].take(token_id, finish, num_cached, now, scores.get(request_id)):
                del self._samples[request_id]
                (over if finish else unwanted).append(request_id)
        if over:
            self._forget(over)
        self._abort_ids(unwanted)

    def _spread_vectors(self, step: StepOutputs) -> None:
        request_ids = np.frombuffer(step.request_ids, "<i8").tolist()
        vectors = np.frombuffer(step.vectors, "<f4").reshape(len(request_ids), -1)
        for request_id, vector in zip(request_ids, vectors, strict=True):
            if (entry := self._samples.get(request_id)) is not None:
                entry[0].vector = vector

    def _reject(self, message: Rejected) -> None:
        entry = self._samples.get(message.request_id)
        if entry is None:
            return
        generation = entry[1]
        if message.status in (429, 503):
            generation.fail(CapacityError(message.message, status=message.status))
        else:
            generation.fail(RequestError(message.message, message.param, status=message.status))
        self.abort(generation)
