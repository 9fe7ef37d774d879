"""What becomes of one HTTP request's tokens on their way to the client: text, stop strings, finish reasons, usage.

A `Generation` holds the samples of all prompts of a request; a `Sample` is one choice. The engine client hands tokens to
samples in one task; the endpoint awaits events. Neither ever waits for the other: what the client does not take is kept, up to
a bound, past which the generation fails and its requests are aborted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from toka.errors import CapacityError, RequestError, TokaError
from toka.messages import FinishReason, TokenLogprob
from toka.metrics import Metrics, SampleTimes
from toka.params import SamplingParams
from toka.pooling import F32
from toka.text.generated_text import GeneratedText
from toka.text.held_scores import HeldScores, ScoredToken
from toka.text.reply_parts import Part
from toka.text.reply_reader import ReplyReading
from toka.text.tokenizer import Tokenizer

MAX_PENDING_EVENTS = 4096  # tokens a streaming client may lag behind


class TokenEvent(NamedTuple):
    """One token of one choice: the choice's index, the text that is now certain (may be empty), the reason if it is the last,
    where logprobs are asked for the tokens that appear with this text, where the reply is read what parts the text has, and the
    token's id, -1 = the end came without one."""

    choice: int
    text: str
    finish_reason: str | None
    scores: Sequence[ScoredToken] = ()
    parts: Sequence[Part] = ()
    token_id: int = -1


class SampleFailedError(TokaError):
    """The engine could not go on with a sample (HTTP 500)."""


class DeadlineError(TokaError):
    """A sample could not begin within the time that its client gave it (HTTP 503)."""


class Sample:
    """One choice of a request, from the first token to the last. scores: its tokens that appear, where logprobs are asked for.

    reader: reads its text as a reply, where that is wanted. token_ids: all that were generated. begun_s, first_token_s: when the engine
    planned its first step, and when its first token came (time.perf_counter()); nan before. last_token_s: when the latest came; the
    request's start before.
    vector: its prompt's, where the engine pools; then there is no token.
    """

    __slots__ = (
        "_generated",
        "_generation",
        "_held_scores",
        "_pieces",
        "_token_bytes",
        "begun_s",
        "first_token_s",
        "index",
        "last_token_s",
        "num_cached_tokens",
        "reader",
        "scores",
        "token_ids",
        "vector",
    )

    def __init__(
        self,
        generation: Generation,
        index: int,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        reading: ReplyReading | None = None,
    ):
        self._generation = generation
        self._token_bytes = tokenizer.token_bytes if reading is None else reading.token_bytes
        self._generated = GeneratedText(self._token_bytes, sampling)
        self._pieces: list[str] = []
        self.last_token_s = generation.start_time
        self.begun_s = self.first_token_s = math.nan
        self.reader = None if reading is None else reading.reader()
        self.token_ids: list[int] = []
        self._held_scores = None if sampling.logprobs is None else HeldScores()
        self.scores: list[ScoredToken] = []
        self.vector: F32 | None = None
        self.index = index
        self.num_cached_tokens = 0

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def num_tokens(self) -> int:
        return self._generated.num_tokens

    @property
    def finish_reason(self) -> str | None:
        return self._generated.finish_reason

    @property
    def times(self) -> SampleTimes:
        """Its life so far."""
        last = self.last_token_s if self.num_tokens else math.nan
        return SampleTimes(self._generation.start_time, self.begun_s, self.first_token_s, last)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._generated.stop_string

    def take_prompt_score(self, score: TokenLogprob) -> None:
        """The next token of this sample's prompt is known, from its second on."""
        self._generation.prompt_scores[self.index // self._generation.samples_per_prompt].append(score)

    def take(
        self, token_id: int, finish: int, num_cached_tokens: int, now: float, score: TokenLogprob | None = None
    ) -> bool:
        """One entry of `StepOutputs`; token_id -1 = none. now: time.perf_counter(). score: of this token, if asked for.

        Returns whether no more is wanted: the sample is over, or its generation has failed.
        """
        generation = self._generation
        if token_id >= 0:
            self._observe_latency(now)
            if self.num_tokens == 0:
                self.num_cached_tokens = num_cached_tokens
                self.first_token_s = now
            self.token_ids.append(token_id)
        offset = self._generated.num_decoded_chars
        text = self._generated.take(token_id, finish)
        if finish == FinishReason.ERROR:
            generation.fail(SampleFailedError("The engine could not go on with this request."))
            return True
        if finish == FinishReason.EXPIRED:
            late = DeadlineError("The request's deadline_s passed before it could begin: the server is busy.")
            generation.fail(late, "expired")
            return True
        if text:
            self._pieces.append(text)
        scores = () if self._held_scores is None else self._appearing(self._held_scores, score, offset)
        parts = () if self.reader is None else self.reader.take(text, is_last=self.finish_reason is not None)
        generation.emit(TokenEvent(self.index, text, self.finish_reason, scores, parts, token_id), now)
        return generation.is_over or self.finish_reason is not None

    def _appearing(self, held: HeldScores, score: TokenLogprob | None, offset: int) -> list[ScoredToken]:
        """The scored tokens that appear with the newest token's text."""
        if score is not None:
            token = ScoredToken(score.token_id, offset, score)
            held.push(token, has_text=bool(self._token_bytes(score.token_id)))
        generated = self._generated
        scores = held.release(generated.num_certain_chars if generated.may_be_cut else None)
        self.scores += scores
        return scores

    def _observe_latency(self, now: float) -> None:
        metrics = self._generation.metrics
        latency = metrics.inter_token_latency_s if self.num_tokens else metrics.time_to_first_token_s
        latency.observe(now - self.last_token_s)
        self.last_token_s = now


class Generation:
    """All samples of one HTTP request: prompt p's sample i has index p * n + i.

    num_prompt_tokens: one count per prompt. prompt_scores: for each prompt what is known of its tokens from the second on, if asked for.
    start_time: time.perf_counter() when the request came. end_time: when all was over; nan before. streaming: whether events are
    wanted one by one; without it they are not kept and `finished` is all there is. reading: how the samples are read as replies; None =
    their text is all that is wanted. on_over: called once, when the last sample has ended or all failed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: Metrics,
        sampling: list[SamplingParams],
        num_prompt_tokens: list[int],
        *,
        start_time: float,
        streaming: bool,
        on_over: Callable[[Generation], None],
        reading: ReplyReading | None = None,
    ):
        self.metrics = metrics
        self.start_time = start_time
        self.end_time = math.nan
        self.num_prompt_tokens = num_prompt_tokens
        self.prompt_scores: list[list[TokenLogprob]] = [[] for _ in sampling]
        self.samples_per_prompt = sampling[0].n
        self._scores_prompts = sampling[0].prompt_logprobs is not None
        self.request_ids: list[int] = []
        self.samples: list[Sample] = []
        for params in sampling:
            first = len(self.samples)
            self.samples += [Sample(self, first + i, params, tokenizer, reading) for i in range(params.n)]
        for prompt_length, params in zip(num_prompt_tokens, sampling, strict=True):
            metrics.observe_request(prompt_length, params.n, params.max_tokens)
        self._on_over = on_over
        self._streaming = streaming
        self._open = set(range(len(self.samples)))  # indices of those that go on
        self._events: deque[TokenEvent] = deque()
        self._error: TokaError | None = None
        self._changed = asyncio.Event()
        self.failed = asyncio.Event()  # set with the error, for a sender that is stuck in a full socket

    @property
    def is_over(self) -> bool:
        return not self._open or self._error is not None

    def is_prompt_scored(self, choice: int) -> bool:
        """Whether all of the prompt of this choice is scored."""
        prompt = choice // self.samples_per_prompt
        return len(self.prompt_scores[prompt]) == self.num_prompt_tokens[prompt] - 1

    def emit(self, event: TokenEvent, now: float) -> None:
        """Called by a sample for each of its tokens."""
        if self._error is not None:
            return
        if event.finish_reason is not None:
            sample = self.samples[event.choice]
            self.metrics.observe_sample(event.finish_reason, sample.times, sample.num_tokens)
            self._open.remove(event.choice)
            if not self._open:
                if event.finish_reason != "abort":
                    self.metrics.e2e_request_latency_s.observe(now - self.start_time)
                self._end(now)
        if self._streaming:
            self._events.append(event)
            self._changed.set()
            if len(self._events) > MAX_PENDING_EVENTS:
                self.fail(CapacityError("The client reads its stream too slowly; the request was aborted."))

    def abort(self) -> None:
        """End every open sample with what it has, for the reason "abort"."""
        if self._scores_prompts and not all(self.is_prompt_scored(sample.index) for sample in self.samples):
            self.fail(RequestError("The request was aborted before its prompt was scored.", code="aborted"), "abort")
        now = time.perf_counter()
        for sample in self.samples:
            if sample.finish_reason is None and not self.is_over:
                sample.take(-1, FinishReason.ABORT, 0, now)

    def fail(self, error: TokaError, reason: str = "error") -> None:
        """End the whole generation with error; the first one counts. reason: for the metrics."""
        if self.is_over:
            return
        self._error = error
        for choice in self._open:
            sample = self.samples[choice]
            self.metrics.observe_sample(reason, sample.times, sample.num_tokens)
        self.failed.set()
        self._end(time.perf_counter())

    def _end(self, now: float) -> None:
        self.end_time = now
        self._changed.set()
        self._on_over(self)

    @property
    def error(self) -> TokaError | None:
        """What it failed with."""
        return self._error

    def summary(self) -> dict[str, object]:
        """For a log: tokens, reasons, and the first sample's times in seconds from the request on."""
        times = self.samples[0].times
        facts: dict[str, object] = {
            "prompt_tokens": sum(self.num_prompt_tokens),
            "cached_tokens": sum(sample.num_cached_tokens for sample in self.samples[:: self.samples_per_prompt]),
            "completion_tokens": sum(sample.num_tokens for sample in self.samples),
            "finish_reasons": [sample.finish_reason for sample in self.samples],
        }
        for name, at_s in (("queue_s", times.begun), ("ttft_s", times.first_token), ("generation_s", self.end_time)):
            if not math.isnan(at_s):
                facts[name] = round(at_s - self.start_time, 6)
        if self._error is not None:
            facts["error"] = str(self._error)
        return facts

    async def finished(self) -> None:
        """Wait for the end of all samples; raise what `fail` was given."""
        while not self.is_over:
            await self._next_change()
        if self._error is not None:
            raise self._error

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """All tokens in the order they came, in lists of what has gathered meanwhile. Raises what `fail` was given."""
        while True:
            if self._error is not None:
                raise self._error
            if self._events:
                batch = list(self._events)
                self._events.clear()
                yield batch
            elif not self._open:
                return
            else:
                await self._next_change()

    async def _next_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
