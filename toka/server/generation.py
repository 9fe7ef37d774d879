"""What becomes of one HTTP request's tokens on their way to the client: text, stop strings, finish reasons, usage.

A `Generation` holds the samples of all prompts of a request; a `Sample` is one choice. The engine client hands tokens to
samples in one task; the endpoint awaits events. Neither ever waits for the other: what the client does not take is kept, up to
a bound, past which the generation fails and its requests are aborted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from toka.errors import CapacityError, TokaError
from toka.messages import FinishReason, TokenLogprob
from toka.metrics import Metrics
from toka.params import SamplingParams
from toka.pooling import F32
from toka.text.generated_text import GeneratedText
from toka.text.held_scores import HeldScores, ScoredToken
from toka.text.tokenizer import Tokenizer

MAX_PENDING_EVENTS = 4096  # tokens a streaming client may lag behind


class TokenEvent(NamedTuple):
    """One token of one choice: the choice's index, the text that is now certain (may be empty), the reason if it is the last, and
    where logprobs are asked for the tokens that appear with this text."""

    choice: int
    text: str
    finish_reason: str | None
    scores: Sequence[ScoredToken] = ()


class SampleFailedError(TokaError):
    """The engine could not go on with a sample (HTTP 500)."""


class DeadlineError(TokaError):
    """A sample could not begin within the time that its client gave it (HTTP 503)."""


class Sample:
    """One choice of a request, from the first token to the last. scores: its tokens that appear, where logprobs are asked for.
    vector: its prompt's, where the engine pools; then there is no token.
    """

    __slots__ = (
        "_generated",
        "_generation",
        "_held_scores",
        "_pieces",
        "_time",
        "_token_bytes",
        "index",
        "num_cached_tokens",
        "scores",
        "vector",
    )

    def __init__(self, generation: Generation, index: int, sampling: SamplingParams, tokenizer: Tokenizer):
        self._generation = generation
        self._generated = GeneratedText(tokenizer.token_bytes, sampling)
        self._pieces: list[str] = []
        self._time = generation.start_time
        self._token_bytes = tokenizer.token_bytes
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
        offset = self._generated.num_decoded_chars
        text = self._generated.take(token_id, finish)
        if finish == FinishReason.ERROR:
            generation.fail(SampleFailedError("The engine could not go on with this request."))
            return True
        if finish == FinishReason.EXPIRED:
            generation.fail(DeadlineError("The request's deadline_s passed before it could begin: the server is busy."))
            return True
        if text:
            self._pieces.append(text)
        scores = () if self._held_scores is None else self._appearing(self._held_scores, score, offset)
        generation.emit(TokenEvent(self.index, text, self.finish_reason, scores), now)
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
        latency.observe(now - self._time)
        self._time = now


class Generation:
    """All samples of one HTTP request: prompt p's sample i has index p * n + i.

    num_prompt_tokens: one count per prompt. prompt_scores: for each prompt what is known of its tokens from the second on, if asked for.
    start_time: time.perf_counter() when the request came. streaming: whether events are wanted one by one; without it they are not
    kept and `finished` is all there is.
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
    ):
        self.metrics = metrics
        self.start_time = start_time
        self.num_prompt_tokens = num_prompt_tokens
        self.prompt_scores: list[list[TokenLogprob]] = [[] for _ in sampling]
        self.samples_per_prompt = sampling[0].n
        self.request_ids: list[int] = []
        self.samples: list[Sample] = []
        for params in sampling:
            first = len(self.samples)
            self.samples += [Sample(self, first + i, params, tokenizer) for i in range(params.n)]
        self._streaming = streaming
        self._num_open = len(self.samples)
        self._events: deque[TokenEvent] = deque()
        self._error: TokaError | None = None
        self._changed = asyncio.Event()
        self.failed = asyncio.Event()  # set with the error, for a sender that is stuck in a full socket

    @property
    def is_over(self) -> bool:
        return self._num_open == 0 or self._error is not None

    def is_prompt_scored(self, choice: int) -> bool:
        """Whether all of the prompt of this choice is scored."""
        prompt = choice // self.samples_per_prompt
        return len(self.prompt_scores[prompt]) == self.num_prompt_tokens[prompt] - 1

    def emit(self, event: TokenEvent, now: float) -> None:
        """Called by a sample for each of its tokens."""
        if event.finish_reason is not None:
            self.metrics.count_finish(event.finish_reason)
            self._num_open -= 1
            if self._num_open == 0:
                self.metrics.e2e_request_latency_s.observe(now - self.start_time)
                self._changed.set()
        if self._streaming:
            self._events.append(event)
            self._changed.set()
            if len(self._events) > MAX_PENDING_EVENTS:
                self.fail(CapacityError("The client reads its stream too slowly; the request was aborted."))

    def fail(self, error: TokaError) -> None:
        """End the whole generation with error; the first one counts."""
        if not self.is_over:
            self._error = error
            self.metrics.count_finish("error")
            self._changed.set()
            self.failed.set()

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
            elif self._num_open == 0:
                return
            else:
                await self._next_change()

    async def _next_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
