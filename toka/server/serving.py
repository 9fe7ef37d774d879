"""What all endpoints share: the tokenizer, the engine, the limits, and the way from a checked body to a running generation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import msgspec
from msgspec import UNSET
from starlette.requests import Request

from toka.config import Config
from toka.errors import CapacityError, RequestError
from toka.messages import Ready
from toka.metrics import CacheFacts, Metrics
from toka.params import MAX_BAD_WORDS, MAX_STOP_TOKEN_IDS, SamplingParams, StructuredOutput
from toka.server.engine_client import RETRY_AFTER_S, EngineClient
from toka.server.generation import Generation
from toka.server.grammar_checker import GrammarChecker
from toka.server.keys import KeyRing
from toka.server.request_context import LEAST_PRIORITY, current
from toka.server.running import RunningRequests
from toka.server.schemas import (
    CompletionTokensDetails,
    GenerationFields,
    PromptTokensDetails,
    Timings,
    Usage,
)
from toka.server.tracing import tracer_of
from toka.text.reply_formats import ModelReplies
from toka.text.reply_reader import ReplyReading
from toka.text.tokenizer import Tokenizer

VERSION = version("toka")
DEFAULT_MODEL = "default"
MAX_STOP_STRINGS = 32
MAX_STOP_STRING_CHARS = 1024
MAX_SESSION_ID_CHARS = 256
MAX_DEADLINE_S = 86400.0
INLINE = 4096  # characters to tokenize or tokens to decode; more is done in a thread, so that the streams of others do not wait


@dataclass
class Serving:
    """The state of one server. model_id: the model's own name; clients may also say `default`. draining: no new requests."""

    config: Config
    model_id: str
    tokenizer: Tokenizer
    engine: EngineClient
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.grammars = GrammarChecker(self.tokenizer)
        self.metrics = Metrics(self.model_id, lambda: self.engine.stats, self._startup_s, self._cache_facts)
        self.tracer = tracer_of(self.config.otlp_endpoint)
        self.running = RunningRequests()
        self.keys = KeyRing.of(self.config)
        template = self.tokenizer.chat_template
        self.replies = (
            None if template is None else ModelReplies(self.tokenizer, template, self.config.tool_call_parser)
        )

    @property
    def system_fingerprint(self) -> str:
        """Names what the results depend on: model, dtype and version."""
        dtype = self.config.dtype if self.engine.ready is None else self.engine.ready.dtype
        return f"fp_{self.model_id}_{dtype}_toka-{VERSION}"

    def _startup_s(self) -> dict[str, float]:
        return self.engine.ready.startup_s if self.engine.ready is not None else {}

    def _cache_facts(self) -> CacheFacts | None:
        ready = self.engine.ready
        return None if ready is None else CacheFacts(ready.block_size, ready.num_kv_blocks)

    @property
    def model_names(self) -> tuple[str, ...]:
        return (DEFAULT_MODEL, self.model_id) if self.model_id != DEFAULT_MODEL else (DEFAULT_MODEL,)

    @property
    def max_request_tokens(self) -> int | None:
        """Prompt + output that one request can hold; None until the engine is ready."""
        return self.engine.ready.max_request_tokens if self.engine.ready is not None else None

    def check_model(self, name: str) -> str:
        """Return name if this server serves it; RequestError (404) if not."""
        if name not in self.model_names:
            raise RequestError(
                f"The model `{name[:80]}` does not exist; this server has {' and '.join(self.model_names)}.",
                "model",
                status=404,
                code="model_not_found",
            )
        return name

    def check_admission(self) -> Ready:
        """The engine's announcement. Raises CapacityError (503) unless it takes requests now, EngineDeadError if it is gone."""
        if self.engine.dead is not None:
            raise self.engine.dead
        if self.draining:
            raise CapacityError("The server is shutting down.", status=503, retry_after_s=RETRY_AFTER_S)
        if self.engine.ready is None:
            raise CapacityError("The engine is warming up.", status=503, retry_after_s=RETRY_AFTER_S)
        return self.engine.ready

    async def encode(self, texts: Sequence[str], param: str, *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts. Raises RequestError naming param for a text that is too long to be worth the work."""
        limit = self.max_request_tokens
        if limit is not None and any(len(text) > limit * self.tokenizer.max_token_bytes for text in texts):
            raise RequestError(f"{param}: the text is longer than {limit} tokens can be.", param)

        def work() -> list[list[int]]:
            return [self.tokenizer.encode(text, add_special_tokens) for text in texts]

        return work() if sum(map(len, texts)) <= INLINE else await asyncio.to_thread(work)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        if len(token_ids) <= INLINE:
            return self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return await asyncio.to_thread(self.tokenizer.decode, token_ids, skip_special_tokens=False)

    def check_prompts(self, prompts: Sequence[Sequence[int]], param: str, vocab_size: int) -> None:
        """Raise RequestError naming param if a prompt is empty, longer than the server takes, or holds an id that is none."""
        for prompt in prompts:
            if not prompt:
                raise RequestError(f"{param} must hold at least one token.", param)
            self._check_length(len(prompt), param)
            self.check_token_ids(prompt, param, vocab_size)

    def check_token_ids(self, token_ids: Sequence[int], param: str, vocab_size: int) -> None:
        """Raise RequestError naming param unless all ids are those of the vocabulary."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise RequestError(f"{param} holds a token id outside 0..{vocab_size - 1}.", param)

    def truncated(self, fields: GenerationFields, prompts: list[list[int]]) -> list[list[int]]:
        """The prompts cut to their last tokens as `truncate_prompt_tokens` asks; RequestError if it asks nonsense."""
        keep = fields.truncate_prompt_tokens
        if keep is UNSET:
            return prompts
        if keep == -1:
            room = self.check_admission().max_request_tokens - (fields.max_tokens or 1)
            keep = max(room, 1)
        if keep < 1:
            raise RequestError("truncate_prompt_tokens must be 1 or more, or -1.", "truncate_prompt_tokens")
        return [prompt[-keep:] for prompt in prompts]

    def submit(
        self,
        fields: GenerationFields,
        prompts: Sequence[Sequence[int]],
        *,
        prompt_param: str,
        default_max_tokens: int | None,
        start_time: float,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        may_generate_nothing: bool = False,
        reading: ReplyReading | None = None,
        structured: StructuredOutput | None = None,
    ) -> Generation:
        """Check everything that can be checked here and hand the prompts to the engine.

        default_max_tokens: where the client gives none; None = as many as the context allows. start_time: perf_counter().
        logprobs, prompt_logprobs, structured: as in SamplingParams; GrammarChecker let the grammar through. may_generate_nothing: whether
        max_tokens may be 0. reading: how the samples are read as replies; None = they are not.
        Raises RequestError naming the field at fault, CapacityError when the server is full.
        """
        ready = self.check_admission()
        if ready.pooling is not None:
            raise RequestError(
                "This server runs a model that generates no text; use /v1/embeddings, /v1/score or /v1/rerank.",
                code="wrong_task",
            )
        if fields.max_tokens == 0 and not may_generate_nothing:
            raise RequestError("max_tokens must be at least 1, or 0 with echo or prompt_logprobs.", "max_tokens")
        sampling = self._sampling(fields, default_max_tokens, logprobs, prompt_logprobs, structured)
        self.check_prompts(prompts, prompt_param, ready.vocab_size)
        self.check_token_ids(sampling.stop_token_ids, "stop_token_ids", ready.vocab_size)
        self.check_token_ids([token for token, _ in sampling.logit_bias], "logit_bias", ready.vocab_size)
        per_prompt = [_fit(sampling, len(prompt), ready.max_request_tokens, prompt_param) for prompt in prompts]
        self._check_room(len(prompts) * sampling.n, "n" if sampling.n > 1 else prompt_param)
        self._check_queue(sum(map(len, prompts)), prompt_param)
        stop_token_ids = self._stop_token_ids(sampling)
        priority = _in_range(fields.priority, "priority", LEAST_PRIORITY, 2**31 - 1)
        session_id, deadline_s = _session_id(fields), _deadline_s(fields)
        generation = self._new_generation(
            prompts,
            per_prompt,
            prompt_param=prompt_param,
            start_time=start_time,
            streaming=fields.stream,
            reading=reading,
        )
        self.engine.submit(
            generation,
            prompts,
            per_prompt,
            stop_token_ids=stop_token_ids,
            cache_salt=fields.cache_salt,
            priority=max(priority, current.get().least_priority),
            session_id=session_id,
            deadline_s=deadline_s,
        )
        return generation

    def _new_generation(
        self,
        prompts: Sequence[Sequence[int]],
        per_prompt: list[SamplingParams],
        *,
        prompt_param: str,
        start_time: float,
        streaming: bool,
        reading: ReplyReading | None = None,
    ) -> Generation:
        """A generation for this request, of which /v1/abort, the log and the traces will know; to be handed to the engine at once."""
        context = current.get()

        def on_over(generation: Generation) -> None:
            self.running.remove(context, generation)
            if self.tracer is not None:
                self.tracer.record(generation, context, self.model_id, prompt_param, per_prompt[0])

        generation = Generation(
            self.tokenizer,
            self.metrics,
            per_prompt,
            [len(prompt) for prompt in prompts],
            start_time=start_time,
            streaming=streaming,
            on_over=on_over,
            reading=reading,
        )
        context.generations.append(generation)
        self.running.add(context, generation)
        return generation

    def submit_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        param: str,
        priority: int,
        start_time: float,
    ) -> Generation:
        """Hand prompts to an engine that pools; a sampling that draws nothing is for all of them.

        Raises RequestError naming param, CapacityError when the server is full.
        """
        for prompt in prompts:
            if not prompt:
                raise RequestError(f"{param} must hold at least one token.", param)
            self._check_length(len(prompt), param)
        self._check_room(len(prompts), param)
        self._check_queue(sum(map(len, prompts)), param)
        priority = _in_range(priority, "priority", LEAST_PRIORITY, 2**31 - 1)
        per_prompt = [sampling] * len(prompts)
        generation = self._new_generation(
            prompts, per_prompt, prompt_param=param, start_time=start_time, streaming=False
        )
        priority = max(priority, current.get().least_priority)
        self.engine.submit(generation, prompts, per_prompt, stop_token_ids=(), priority=priority)
        return generation

    def _sampling(
        self,
        fields: GenerationFields,
        default_max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        structured: StructuredOutput | None,
    ) -> SamplingParams:
        stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop can hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}.", "stop")
        if any(len(text) > MAX_STOP_STRING_CHARS for text in stop):
            raise RequestError(f"stop: a string is longer than {MAX_STOP_STRING_CHARS} characters.", "stop")
        if fields.n > self.config.max_n:
            raise RequestError(f"n must be at most {self.config.max_n} on this server, got {str(fields.n)[:40]}.", "n")
        if fields.stream_options is not UNSET and not fields.stream:
            raise RequestError("stream_options is only allowed with stream.", "stream_options")
        return SamplingParams(
            n=fields.n,
            max_tokens=default_max_tokens if fields.max_tokens is UNSET else fields.max_tokens,
            min_tokens=fields.min_tokens,
            temperature=fields.temperature,
            top_k=max(fields.top_k, 0) if fields.top_k == -1 else fields.top_k,
            top_p=fields.top_p,
            min_p=fields.min_p,
            seed=None if fields.seed is UNSET else fields.seed,
            stop=stop,
            stop_token_ids=tuple(dict.fromkeys(fields.stop_token_ids)),
            ignore_eos=fields.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=structured,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            repetition_penalty=fields.repetition_penalty,
            logit_bias=_logit_bias(fields),
            bad_words=self._bad_words(fields),
        ).check()

    def _stop_token_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        own = () if sampling.ignore_eos else self.tokenizer.eos_token_ids
        together = tuple(dict.fromkeys((*sampling.stop_token_ids, *own)))
        if len(together) > MAX_STOP_TOKEN_IDS:
            room = MAX_STOP_TOKEN_IDS - len(own)
            raise RequestError(f"stop_token_ids can hold at most {room} ids with this model.", "stop_token_ids")
        return together

    def _check_length(self, num_prompt_tokens: int, param: str) -> None:
        limit = self.config.max_prompt_tokens
        if limit is not None and num_prompt_tokens > limit:
            raise RequestError(
                f"{param} has {num_prompt_tokens} tokens; this server takes {limit} at most.",
                param,
                code="context_length_exceeded",
            )

    def _bad_words(self, fields: GenerationFields) -> tuple[tuple[int, ...], ...]:
        """The words as token ids, as they are written at the beginning of a text and after a space."""
        if len(fields.bad_words) > MAX_BAD_WORDS:
            raise RequestError(f"bad_words can hold at most {MAX_BAD_WORDS} words.", "bad_words")
        for word in fields.bad_words:
            if not word.strip() or len(word) > MAX_STOP_STRING_CHARS:
                raise RequestError(f"bad_words must be of 1 to {MAX_STOP_STRING_CHARS} characters each.", "bad_words")
        texts = [text for word in fields.bad_words for text in (word, f" {word.lstrip()}")]
        return tuple(dict.fromkeys(tuple(self.tokenizer.encode(text, False)) for text in texts))

    def _check_room(self, num_samples: int, param: str) -> None:
        limit = self.config.max_queued_requests
        if num_samples > limit:
            raise RequestError(f"{param}: {num_samples} samples asked for, the server holds {limit} at most.", param)
        if self.engine.num_open + num_samples > limit:
            raise CapacityError(f"The server is full: {self.engine.num_open} of {limit} requests are open.")

    def _check_queue(self, num_tokens: int, param: str) -> None:
        limit, queued = self.config.max_queued_tokens, self.engine.num_queued_tokens
        if limit is None:
            return
        if num_tokens > limit:
            raise RequestError(f"{param} has {num_tokens} tokens; the server's queue holds {limit} at most.", param)
        if queued + num_tokens > limit:
            raise CapacityError(f"The server is full: {queued} of {limit} prompt tokens wait for their turn.")


def _logit_bias(fields: GenerationFields) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), bias) for token, bias in fields.logit_bias.items())
    except ValueError:
        raise RequestError("logit_bias: its keys must be token ids.", "logit_bias") from None


def num_prompt_logprobs(fields: GenerationFields) -> int | None:
    """As asked for; None = no logprobs of the prompt. RequestError where they cannot be told."""
    if fields.prompt_logprobs is UNSET:
        return None
    if fields.stream:
        raise RequestError("prompt_logprobs is not available with stream.", "prompt_logprobs")
    return fields.prompt_logprobs


def serving_of(request: Request) -> Serving:
    """The state that `create_app` attached."""
    serving: Serving = request.app.state.serving
    return serving


def usage_of(generation: Generation) -> Usage:
    """The tokens of a generation so far."""
    readers = [sample.reader for sample in generation.samples if sample.reader is not None]
    prompt_tokens = sum(generation.num_prompt_tokens)
    completion_tokens = sum(sample.num_tokens for sample in generation.samples)
    first_samples = generation.samples[:: generation.samples_per_prompt]
    cached = sum(sample.num_cached_tokens for sample in first_samples)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached),
        CompletionTokensDetails(sum(reader.num_reasoning_tokens for reader in readers)),
    )


def timings_of(generation: Generation) -> Timings:
    """How long a generation took that is over."""

    def since_start(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - generation.start_time, 6)

    begun = [sample for sample in generation.samples if sample.num_tokens]
    return Timings(
        since_start(min((sample.first_token_s for sample in begun), default=None)),
        since_start(max((sample.last_token_s for sample in begun), default=None)),
        time.perf_counter() - generation.start_time,
    )


def _fit(sampling: SamplingParams, num_prompt_tokens: int, limit: int, prompt_param: str) -> SamplingParams:
    """sampling with max_tokens set; RequestError if prompt and output cannot fit into one request."""
    room = limit - num_prompt_tokens
    if room < 1:
        raise RequestError(
            f"{prompt_param} has {num_prompt_tokens} tokens; one request can hold {limit}, output included.",
            prompt_param,
            code="context_length_exceeded",
        )
    if (sampling.max_tokens or 1) > room:
        raise RequestError(
            f"{prompt_param} has {num_prompt_tokens} tokens and max_tokens is {sampling.max_tokens}: together more than the "
            f"{limit} tokens that one request can hold.",
            "max_tokens",
            code="context_length_exceeded",
        )
    return msgspec.structs.replace(sampling, max_tokens=room if sampling.max_tokens is None else sampling.max_tokens)


def _session_id(fields: GenerationFields) -> str:
    if len(fields.session_id) > MAX_SESSION_ID_CHARS:
        raise RequestError(f"session_id is longer than {MAX_SESSION_ID_CHARS} characters.", "session_id")
    return fields.session_id


def _deadline_s(fields: GenerationFields) -> float:
    if fields.deadline_s is UNSET:
        return math.inf
    if not 0.0 < fields.deadline_s <= MAX_DEADLINE_S:
        raise RequestError(
            f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:g} seconds, got {fields.deadline_s:g}.",
            "deadline_s",
        )
    return fields.deadline_s


def _in_range(value: int, param: str, low: int, high: int) -> int:
    if not low <= value <= high:
        raise RequestError(f"{param} must be between {low} and {high}.", param)
    return value
