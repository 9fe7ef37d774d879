"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError
from toka.params import MAX_SAMPLES_PER_REQUEST
from toka.server.body import read_body
from toka.server.generation import Generation, Sample, TokenEvent
from toka.server.logprobs import completion_logprobs, prompt_logprobs, scored_prompt
from toka.server.openapi import describe
from toka.server.request_context import current
from toka.server.schemas import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt
from toka.server.serving import Serving, num_prompt_logprobs, serving_of, timings_of, usage_of
from toka.server.stream import ChunkTemplate, respond
from toka.server.structured import structured_output
from toka.text.held_scores import ScoredToken
from toka.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


@router.post("/v1/completions", openapi_extra=describe(CompletionRequest, Completion, streams=True))
async def create_completion(request: Request) -> Response:
    """Continue a text, or several."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    serving.check_admission()
    body = await read_body(request, CompletionRequest)
    model = serving.check_model(body.model)
    structured = await structured_output(serving, body)
    prompts, texts = await _token_prompts(serving, body)
    if body.truncate_prompt_tokens is not UNSET:
        prompts, texts = serving.truncated(body, prompts), []
    num_kept = _num_kept(body)
    logprobs = None if body.logprobs is UNSET else body.logprobs
    of_prompt = [num for num in (num_prompt_logprobs(body), logprobs if body.echo else None) if num is not None]
    generation = serving.submit(
        body,
        prompts,
        prompt_param="prompt",
        default_max_tokens=DEFAULT_MAX_TOKENS,
        start_time=start_time,
        structured=structured,
        logprobs=0 if logprobs is None and num_kept < body.n else logprobs,
        prompt_logprobs=max(of_prompt, default=None),
        may_generate_nothing=body.echo or bool(of_prompt),
    )
    replies = _Replies(serving.tokenizer, body, generation, prompts, texts, num_kept)
    head: dict[str, Any] = {
        "id": f"cmpl-{current.get().request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": serving.system_fingerprint,
    }

    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _chunks(head, replies, events)) if body.stream else None,
        whole=lambda: Completion(
            **head,
            choices=replies.choices(),
            usage=usage_of(generation),
            timings=timings_of(generation) if body.return_timings else UNSET,
        ),
    )


def _num_kept(body: CompletionRequest) -> int:
    """How many samples of a prompt the reply tells; n becomes the number that is generated."""
    num_kept, best_of = body.n, body.best_of
    if best_of is UNSET:
        return num_kept
    if not num_kept <= best_of <= MAX_SAMPLES_PER_REQUEST:
        raise RequestError(f"best_of must be from n to {MAX_SAMPLES_PER_REQUEST}.", "best_of")
    if best_of > num_kept and body.stream:
        raise RequestError("best_of is not available with stream, unless it equals n.", "best_of")
    body.n = best_of
    return num_kept


async def _token_prompts(serving: Serving, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """The prompts' token ids, and their texts where the client gave texts."""
    texts, token_prompts = prompts_of(body.prompt)
    if texts:
        return await serving.encode(texts, "prompt", add_special_tokens=body.add_special_tokens), texts
    return token_prompts, []


def prompts_of(prompt: Prompt, param: str = "prompt") -> tuple[list[str], list[list[int]]]:
    """The texts, or the token prompts, that `prompt` holds; one of the two is empty. RequestError naming param if it mixes them."""
    if isinstance(prompt, str):
        return [prompt], []
    kinds = {type(entry) for entry in prompt}
    if kinds == {str}:
        return prompt, []  # type: ignore[return-value]
    if kinds == {int}:
        return [], [prompt]  # type: ignore[list-item]
    if kinds == {list}:
        return [], prompt  # type: ignore[return-value]
    rule = "must not mix texts and token ids" if kinds else "must not be empty"
    raise RequestError(f"{param} {rule}.", param)


class _Replies:
    """What the choices of one request say: their text, after the prompt's where it is echoed, and their logprobs.

    prompts: token ids. texts: of the prompts, empty where the client gave token ids. num_kept: samples of each prompt that are told.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: CompletionRequest,
        generation: Generation,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[str],
        num_kept: int,
    ):
        self.body, self.generation = body, generation
        self._num_kept = num_kept
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._texts: Sequence[str] = [""] * len(prompts)
        if body.echo:
            self._texts = texts or [tokenizer.decode(prompt) for prompt in prompts]

    def choices(self) -> list[CompletionChoice]:
        """Those that are told, whole; where that is not all, the likeliest per token of each prompt, the best one first."""
        samples, num_made = self.generation.samples, self.generation.samples_per_prompt
        if self._num_kept == num_made:
            return [self._choice(sample) for sample in samples]
        kept: list[CompletionChoice] = []
        for first in range(0, len(samples), num_made):
            best = sorted(samples[first : first + num_made], key=_mean_logprob, reverse=True)[: self._num_kept]
            kept += [
                msgspec.structs.replace(self._choice(sample), index=len(kept) + i) for i, sample in enumerate(best)
            ]
        return kept

    def _choice(self, sample: Sample) -> CompletionChoice:
        text, logprobs = self._text_of(sample.index), self.logprobs_of(sample.index, sample.scores)
        if logprobs is not None and self.body.echo:
            logprobs = _joined(self._prompt_logprobs_of(sample.index), logprobs)
        choice = CompletionChoice(sample.index, text + sample.text, sample.finish_reason, logprobs)
        if self.body.prompt_logprobs is not UNSET:
            scores = self.generation.prompt_scores[self._prompt_of(sample.index)]
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, scores, self.body.prompt_logprobs)
        if self.body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = sample.token_ids, self.prompt_ids_of(sample.index)
        return choice

    def prompt_ids_of(self, choice: int) -> list[int]:
        """The prompt of this choice."""
        return list(self._prompts[self._prompt_of(choice)])

    def logprobs_of(self, choice: int, scores: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        """Of these generated tokens; None unless asked for."""
        if self.body.logprobs is UNSET:
            return None
        return completion_logprobs(self._tokenizer, scores, self.body.logprobs, len(self._text_of(choice)))

    def echo_of(self, choice: int) -> tuple[str, CompletionLogprobs | None]:
        """The prompt's text and, if asked for, its logprobs; None for those while it is not scored whole."""
        return self._text_of(choice), None if self.body.logprobs is UNSET else self._prompt_logprobs_of(choice)

    def can_echo(self, choice: int) -> bool:
        """Whether all that `echo_of` tells is known."""
        return self.body.logprobs is UNSET or self.generation.is_prompt_scored(choice)

    def _prompt_logprobs_of(self, choice: int) -> CompletionLogprobs:
        assert self.body.logprobs is not UNSET
        prompt = self._prompt_of(choice)
        scores = self.generation.prompt_scores[prompt]
        tokens = scored_prompt(self._tokenizer, self._prompts[prompt], self._texts[prompt], scores)
        return completion_logprobs(self._tokenizer, tokens, self.body.logprobs)

    def _text_of(self, choice: int) -> str:
        return self._texts[self._prompt_of(choice)]

    def _prompt_of(self, choice: int) -> int:
        return choice // self.generation.samples_per_prompt


def _mean_logprob(sample: Sample) -> float:
    """How likely the sample's tokens are, those that appear."""
    logprobs = [token.score.logprob for token in sample.scores if token.score is not None]
    return sum(logprobs) / max(len(logprobs), 1)


def _joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        first.text_offset + then.text_offset,
        first.token_logprobs + then.token_logprobs,
        first.tokens + then.tokens,
        first.top_logprobs + then.top_logprobs,
    )


async def _chunks(
    head: dict[str, Any], replies: _Replies, events: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[bytes]:
    body, generation = replies.body, replies.generation
    template = ChunkTemplate(head, b'"text":', b"", options=body.stream_options, usage=lambda: usage_of(generation))
    unnamed = {sample.index for sample in generation.samples}  # choices whose prompts' ids were not told yet

    def chunk(event: TokenEvent) -> bytes:
        logprobs = msgspec.json.encode(replies.logprobs_of(event.choice, event.scores)) if event.scores else b"null"
        return template.token(event, logprobs, token_ids(event) if body.return_token_ids else b"")

    def token_ids(event: TokenEvent) -> bytes:
        more = b',"token_ids":%b' % msgspec.json.encode([event.token_id] if event.token_id >= 0 else [])
        if event.choice in unnamed:
            unnamed.remove(event.choice)
            more += b',"prompt_token_ids":%b' % msgspec.json.encode(replies.prompt_ids_of(event.choice))
        return more

    async for batch in _echoed(replies, template, events) if body.echo else events:
        yield b"".join(each if isinstance(each, bytes) else chunk(each) for each in batch)
    yield template.last((lambda: timings_of(generation)) if body.return_timings else None)


async def _echoed(
    replies: _Replies, template: ChunkTemplate, events: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[list[bytes | TokenEvent]]:
    """The events with a chunk before the first one of each choice that says its prompt.

    Only the first sample scores a prompt, so that another one's tokens may have to wait for it.
    """
    waiting: dict[int, list[TokenEvent]] = {sample.index: [] for sample in replies.generation.samples}
    async for batch in events:
        said: list[bytes | TokenEvent] = []
        for event in batch:
            if event.choice not in waiting:
                said.append(event)
                continue
            waiting[event.choice].append(event)
            for choice in [choice for choice, held in waiting.items() if held and replies.can_echo(choice)]:
                text, logprobs = replies.echo_of(choice)
                said.append(template.token(TokenEvent(choice, text, None), msgspec.json.encode(logprobs)))
                said += waiting.pop(choice)
        yield said
