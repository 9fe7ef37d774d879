"""An engine without a model: speaks toka.messages, answers with the prompt's own tokens, and misbehaves when told to."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import zmq

from toka.messages import (
    Abort,
    EngineStats,
    Fatal,
    FinishReason,
    Ping,
    Pong,
    Ready,
    Rejected,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
    TokenScores,
    decode_to_engine,
    encode,
    unpack_tokens,
)
from toka.params import MAX_LOGPROBS
from toka.pooling import Pooling

MAX_REQUEST_TOKENS = 2000
REPORT: dict[str, object] = {
    "phases_s": {"load": 0.5, "compile": 1.5},
    "memory": {"weights": 3 * 2**20, "activations": 2**20, "kv_cache": 12 * 2**20, "headroom": 0},
    "kernels": {"paged_attention": "cpp: the only one for this machine"},
    "buckets": [{"num_tokens": 1, "num_samples": 1, "run_us": 1234.5, "capture_mib": 0.0}],
}
VOCAB_SIZE = 258


def repeat_prompt(submit: Submit, sample: int) -> list[int]:
    """The prompt's tokens over and over, begun at its token number `sample`."""
    prompt = unpack_tokens(submit.prompt).tolist()
    return (prompt * (MAX_REQUEST_TOKENS // len(prompt) + 2))[sample:]


def logprob_of(token: int) -> float:
    """What the fake says of a token, as the next one anywhere; the values are floats of 32 bits."""
    return -(token % 64) / 8 - 0.125


def scores_of(request_ids: list[int], tokens: list[int], width: int) -> TokenScores | None:
    """Of these tokens, with tokens 64, 65, ... (whose logprobs fall from -1/8 on) as the likeliest."""
    if not tokens:
        return None
    top = np.arange(64, 64 + width)
    return TokenScores(
        request_ids=np.array(request_ids, "<i8").tobytes(),
        token_ids=np.array(tokens, "<i4").tobytes(),
        logprobs=np.array([logprob_of(token) for token in tokens], "<f4").tobytes(),
        ranks=np.array([token % 64 + 1 for token in tokens], "<i4").tobytes(),
        top_ids=np.tile(top, len(tokens)).astype("<i4").tobytes(),
        top_logprobs=np.array([logprob_of(token) for _ in tokens for token in top.tolist()], "<f4").tobytes(),
        width=width,
    )


@dataclass
class Behaviour:
    """What the fake does. reply: a sample's tokens. step_s: time of one step, in which every request gets one token.

    reject: what to answer to a Submit instead, if anything. deaf_to_ping: never answer Ping. error_at_token: end requests with
    `error` after so many tokens. prompt_scores_per_step: of a prompt's tokens; only a Submit's first sample waits for them.
    die_at_step: exit the process in that step. tokens_per_step: of one request. warm_s: warmup time; fatal: say so instead of Ready.
    pooling: be an engine that pools, whose vectors `vector_of` makes.
    """

    reply: Callable[[Submit, int], list[int]] = repeat_prompt
    step_s: float = 0.0
    reject: Callable[[Submit], Rejected | None] = lambda _: None
    deaf_to_ping: bool = False
    error_at_token: int | None = None
    error: FinishReason = FinishReason.ERROR
    die_at_step: int | None = None
    warm_s: float = 0.0
    fatal: Fatal | None = None
    max_request_tokens: int = MAX_REQUEST_TOKENS
    prompt_scores_per_step: int = 1000
    vocab_size: int = VOCAB_SIZE
    tokens_per_step: int = 1
    pooling: Pooling | None = None


def vector_of(prompt: list[int], width: int) -> np.ndarray:
    """What the fake makes of a prompt; float32 [width], no two prompts alike."""
    return np.random.default_rng(prompt).standard_normal(width, dtype=np.float32) * 3


@dataclass
class _Row:
    submit: Submit
    tokens: list[int]
    num_done: int = 0
    unscored: list[int] = field(default_factory=list)


@dataclass
class FakeEngine:
    """Runs in the thread or process that calls `run`. received: every message, for the test to look at."""

    behaviour: Behaviour
    received: list[ToEngine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._begun: list[tuple[int, float]] = []
        self._num_steps = 0
        self._num_tokens = 0

    def aborted(self) -> set[int]:
        return {i for message in list(self.received) if isinstance(message, Abort) for i in message.request_ids}

    def submitted(self) -> list[Submit]:
        return [message for message in list(self.received) if isinstance(message, Submit)]

    def run(self, address_in: str, address_out: str, stop: threading.Event) -> None:
        with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
            inbox.set_hwm(0)
            outbox.set_hwm(0)
            outbox.linger = 500
            inbox.connect(address_in)
            outbox.connect(address_out)
            self._send = lambda message: outbox.send(encode(message))
            time.sleep(self.behaviour.warm_s)
            if self.behaviour.fatal is not None:
                self._send(self.behaviour.fatal)
                return
            self._send(self._ready())
            while not stop.is_set():
                if inbox.poll(0 if self._rows else 20):
                    message = decode_to_engine(inbox.recv())
                    self.received.append(message)
                    if isinstance(message, Shutdown):
                        return
                    self._take(message)
                elif self._rows:
                    self._step()

    def _ready(self) -> Ready:
        return Ready(
            vocab_size=self.behaviour.vocab_size,
            max_context_tokens=self.behaviour.max_request_tokens,
            max_request_tokens=self.behaviour.max_request_tokens,
            num_kv_blocks=1000,
            block_size=16,
            dtype="float32",
            device="cpu",
            longest_step_s=0.01,
            startup_s={"load": 0.5, "compile": 1.5},
            report=REPORT,
            pooling=self.behaviour.pooling,
        )

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit():
                if (rejected := self.behaviour.reject(message)) is not None:
                    self._send(rejected)
                    return
                for sample in range(message.sampling.n):
                    row = _Row(message, self.behaviour.reply(message, sample))
                    if message.sampling.prompt_logprobs is not None and sample == 0:
                        row.unscored = unpack_tokens(message.prompt).tolist()[1:]
                    self._rows[message.request_id + sample] = row
                    self._begun.append((message.request_id + sample, time.perf_counter()))
            case Abort(request_ids=request_ids):
                for request_id in request_ids:
                    self._rows.pop(request_id, None)
            case Ping(nonce=nonce):
                if not self.behaviour.deaf_to_ping:
                    self._send(Pong(nonce, self._stats()))

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._rows),
            num_free_blocks=750,
            num_blocks=1000,
            num_steps_total=self._num_steps,
            prompt_tokens_total=10,
            cached_prompt_tokens_total=4,
            generation_tokens_total=self._num_tokens,
        )

    def _step(self) -> None:
        time.sleep(self.behaviour.step_s)
        self._num_steps += 1
        if self._num_steps == self.behaviour.die_at_step:
            os._exit(7)
        prompt_scores = self._score_prompts()
        request_ids: list[int] = []
        token_ids, finish = [], []
        begun, self._begun = self._begun, []
        scored: list[tuple[int, int]] = []
        vectors = self._vectors()
        for request_id in [i for i, row in self._rows.items() if not row.unscored]:
            for _ in range(self.behaviour.tokens_per_step):
                token, reason = self._next_token(self._rows[request_id])
                if self._rows[request_id].submit.sampling.logprobs is not None and token >= 0:
                    scored.append((request_id, token))
                request_ids.append(request_id)
                token_ids.append(token)
                finish.append(reason)
                if reason:
                    del self._rows[request_id]
                    break
        self._num_tokens += len(request_ids)
        self._send(
            StepOutputs(
                request_ids=np.array(request_ids, "<i8").tobytes(),
                token_ids=np.array(token_ids, "<i4").tobytes(),
                finish=bytes(finish),
                cached=np.full(len(request_ids), 3, "<i4").tobytes(),
                stats=self._stats(),
                begun=np.array([i for i, _ in begun], "<i8").tobytes(),
                begun_s=np.array([at_s for _, at_s in begun], "<f8").tobytes(),
                scores=scores_of([i for i, _ in scored], [token for _, token in scored], MAX_LOGPROBS),
                prompt_scores=prompt_scores,
                vectors=vectors,
            )
        )

    def _vectors(self) -> bytes:
        if self.behaviour.pooling is None:
            return b""
        prompts = [unpack_tokens(row.submit.prompt).tolist() for row in self._rows.values()]
        return np.stack([vector_of(prompt, self.behaviour.pooling.width) for prompt in prompts]).tobytes()

    def _score_prompts(self) -> TokenScores | None:
        count, scored = self.behaviour.prompt_scores_per_step, []
        for request_id, row in self._rows.items():
            scored += [(request_id, token) for token in row.unscored[:count]]
            row.unscored = row.unscored[count:]
        return scores_of([i for i, _ in scored], [token for _, token in scored], MAX_LOGPROBS)

    def _next_token(self, row: _Row) -> tuple[int, int]:
        if row.num_done == self.behaviour.error_at_token:
            return -1, self.behaviour.error
        if row.submit.sampling.max_tokens == 0:
            return -1, FinishReason.LENGTH
        token = row.tokens[row.num_done]
        row.num_done += 1
        if token in row.submit.stop_token_ids and row.num_done > row.submit.sampling.min_tokens:
            return token, FinishReason.STOP
        at_end = row.num_done in (row.submit.sampling.max_tokens, len(row.tokens))
        return token, FinishReason.LENGTH if at_end else FinishReason.NONE


def run(config: object, source: object, address_in: str, address_out: str) -> None:
    """The target of an engine process; its behaviour comes as JSON in FAKE_ENGINE."""
    fields = json.loads(os.environ.get("FAKE_ENGINE", "{}"))
    if "fatal" in fields:
        fields["fatal"] = Fatal(**fields["fatal"])
    FakeEngine(Behaviour(**fields)).run(address_in, address_out, threading.Event())
