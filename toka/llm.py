"""The engine as a library, in this process: `LLM("default").generate(prompts, SamplingParams(max_tokens=64))` (floor 8)."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from toka.config import Config, hub_offline, num_available_cores, set_engine_environment
from toka.errors import ConfigError
from toka.messages import EngineStats, Submit, TokenLogprob, pack_tokens
from toka.model_source import locate, read_hf_config
from toka.params import SamplingParams
from toka.pooling import F32, Pooling, tokens_kept
from toka.text.generated_text import GeneratedText
from toka.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from toka.scheduler.outputs import TokenOutputs

Prompt = str | Sequence[int]

_NOTHING_DRAWN = SamplingParams(max_tokens=0)

_SERVER_FLAGS = {
    "served_model_name",
    "host",
    "port",
    "api_key",
    "tool_call_parser",
    "allow_request_chat_template",
    "max_queued_requests",
    "drain_timeout_s",
    "stats_report_seconds",
    "uvicorn_log_level",
    "log_level",
}


@dataclasses.dataclass
class Completion:
    """One sample. token_ids: everything generated, an end token included. finish_reason: "stop", "length", or
    "error" if the engine could not go on, since a grammar became too complex.

    logprobs: one entry for each of token_ids; None unless SamplingParams.logprobs asks.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclasses.dataclass
class RequestOutput:
    """One prompt and its `n` samples. num_cached_tokens: of the prompt, found in the prefix cache.

    prompt_logprobs: one entry for each token of the prompt, None for the first, which nothing predicts; None unless
    SamplingParams.prompt_logprobs asks.
    """

    prompt_token_ids: list[int]
    completions: list[Completion]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclasses.dataclass
class EmbeddingOutput:
    """One prompt's vector: float32 [width], brought to length 1 if the model is made for that or the caller asked."""

    prompt_token_ids: list[int]
    embedding: F32


class LLM:
    """A model, loaded, compiled and warm. Not thread-safe. Flags are those of `toka key=value`, as keyword arguments, but for the server's.
    Make it before anything imports torch, or set OMP_NUM_THREADS and GOMP_SPINCOUNT yourself: torch reads them once.

    report: what the warmup found, with plain types only (phases, buckets, kernels, memory in bytes).
    Raises ConfigError for a wrong flag, checkpoint or machine. Call `close()` (or use `with`) to free the model.
    """

    def __init__(self, model: str = "default", *, quiet: bool = False, **flags: Any):
        known = {spec.name for spec in dataclasses.fields(Config)}
        if unknown := sorted(flags.keys() - known):
            raise ConfigError(f"unknown flag {unknown[0]!r}")
        if useless := sorted(flags.keys() & _SERVER_FLAGS):
            raise ConfigError(f"{useless[0]} is a flag of the server; LLM has no use for it")
        config = Config(model=model, **flags).check()
        cache = config.cache_path()
        set_engine_environment(config.num_threads or num_available_cores(), cache)
        from toka.engine.build import build_engine  # imports torch, which reads the environment set above

        source = locate(config.model, config.tokenizer, cache, offline=hub_offline())
        self._engine, ready = build_engine(config, source, quiet=quiet)
        self._pooling, self._max_prompt_tokens = ready.pooling, ready.max_request_tokens
        self.report = ready.report
        self.tokenizer = Tokenizer.load(source.tokenizer_path, read_hf_config(source)["eos_token_id"])
        self.model_name = source.name
        self._request_ids = itertools.count(1)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the step thread and free the model; the object is of no further use."""
        self._engine.shutdown()
        del self._engine

    def stats(self) -> EngineStats:
        """Gauges and counters of the engine since it was built."""
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate from each prompt (text, or token ids); results in the order of the prompts.

        params: one for all, or one each. Raises RequestError for a prompt or setting that cannot be; then nothing runs on.
        """
        if self._pooling is not None:
            raise ConfigError(f"{self.model_name} generates no text here; use embed() or score()")
        all_prompts = _as_list(prompts)
        all_params = (
            [params or SamplingParams()] * len(all_prompts) if not isinstance(params, Sequence) else list(params)
        )
        if len(all_params) != len(all_prompts):
            raise ValueError(f"{len(all_prompts)} prompts but {len(all_params)} SamplingParams")
        run = _Run(self)
        try:
            for prompt, each in zip(all_prompts, all_params, strict=True):
                run.submit(self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt), each.check())
            with tqdm(total=len(run.samples), desc="generate", disable=not use_tqdm, unit="sample") as bar:
                run.to_the_end(bar)
        finally:
            run.abort()
        return run.outputs

    def chat(
        self,
        conversations: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate the assistant's next message in one conversation (a list of messages) or several."""
        several: Any = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
        template = self.tokenizer.chat_template
        if template is None:
            raise ConfigError(f"{self.model_name} has no chat template; use generate()")
        texts = [template.render(messages, add_generation_prompt=True) for messages in several]
        return self.generate(
            [self.tokenizer.encode(text, add_special_tokens=False) for text in texts], params, use_tqdm=use_tqdm
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """A vector for each prompt (text, or token ids), in their order.

        dimensions: keep so many numbers of each. normalize: bring vectors to length 1; None: as the model wants it. truncate_prompt_tokens:
        cut prompts at their end to so many tokens, -1 = to what the model holds. Raises ConfigError unless the model embeds, RequestError
        for a prompt that is too long.
        """
        pooling = self._pooling_for("embed")
        if dimensions is not None:
            pooling.check_dimensions(dimensions)
        limit = tokens_kept(truncate_prompt_tokens, self._max_prompt_tokens)
        encoded = [self._encode_cut(prompt, limit) for prompt in _as_list(prompts)]
        vectors = self._pool(encoded, use_tqdm)
        return [
            EmbeddingOutput(prompt, pooling.finish(vector, dimensions, normalize))
            for prompt, vector in zip(encoded, vectors, strict=True)
        ]

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[float]:
        """How well the texts of each pair fit, as the model's classification head says; -1 cuts pairs to what the model holds."""
        pooling = self._pooling_for("score")
        limit = tokens_kept(truncate_prompt_tokens, self._max_prompt_tokens)
        encoded = [pooling.pair_ids(*self.tokenizer.encode_pair(*pair, limit)) for pair in pairs]
        return [pooling.score(vector) for vector in self._pool(encoded, use_tqdm)]

    def _pooling_for(self, task: str) -> Pooling:
        if self._pooling is None or self._pooling.task != task:
            raise ConfigError(f"{self.model_name} was not loaded to {task}; pass task={task!r} with a model that can")
        return self._pooling

    def _encode_cut(self, prompt: Prompt, limit: int | None) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)[:limit]
        return self.tokenizer.encode(prompt) if limit is None else self.tokenizer.encode_cut(prompt, limit)

    def _pool(self, prompts: list[list[int]], use_tqdm: bool) -> list[F32]:
        """The prompts' vectors as the engine pools them."""
        found: dict[int, F32] = {}
        request_ids: list[int] = []
        try:
            for prompt in prompts:
                request_id = next(self._request_ids)
                submit = Submit(
                    request_id=request_id,
                    prompt=pack_tokens(prompt),
                    sampling=_NOTHING_DRAWN,
                    stop_token_ids=(),
                    seed=0,
                )
                self._engine.submit(submit)
                request_ids.append(request_id)
            with tqdm(total=len(prompts), desc="pool", disable=not use_tqdm, unit="prompt") as bar:
                while self._engine.has_work:
                    outputs = self._engine.step()
                    if outputs is not None and outputs.vectors is not None:
                        found.update(zip(outputs.request_ids.tolist(), outputs.vectors, strict=True))
                        bar.update(len(outputs))
        finally:
            self._engine.abort([request_id for request_id in request_ids if request_id not in found])
            while self._engine.has_work:
                self._engine.step()
        return [found[request_id] for request_id in request_ids]


def _as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many as a list of prompts; a sequence of ints is one prompt."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence))
    return [prompts] if is_one else list(prompts)


def _empty_completion(params: SamplingParams) -> Completion:
    return Completion(logprobs=None if params.logprobs is None else [])


def _cut(entry: TokenLogprob, num_top: int | None) -> TokenLogprob:
    """The entry with no more of the likeliest tokens than were asked for."""
    return entry._replace(top=entry.top[:num_top])


class _Sample(NamedTuple):
    output: RequestOutput
    completion: Completion
    text: GeneratedText
    params: SamplingParams


class _Run:
    """The requests of one call of `generate`."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self.outputs: list[RequestOutput] = []
        self.samples: dict[int, _Sample] = {}

    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        llm, first_id = self._llm, next(self._llm._request_ids)
        llm._request_ids = itertools.count(first_id + params.n)
        stop_ids = (
            params.stop_token_ids if params.ignore_eos else (*llm.tokenizer.eos_token_ids, *params.stop_token_ids)
        )
        seed = secrets.randbits(62) if params.seed is None else params.seed
        llm._engine.submit(
            Submit(
                request_id=first_id,
                prompt=pack_tokens(prompt),
                sampling=params,
                stop_token_ids=tuple(dict.fromkeys(stop_ids)),
                seed=seed,
            ),
            waits=True,
        )
        output = RequestOutput(prompt, [_empty_completion(params) for _ in range(params.n)])
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self.outputs.append(output)
        for i, completion in enumerate(output.completions):
            text = GeneratedText(llm.tokenizer.token_bytes, params)
            self.samples[first_id + i] = _Sample(output, completion, text, params)

    def to_the_end(self, bar: tqdm) -> None:
        engine = self._llm._engine
        while engine.has_work:
            outputs = engine.step()
            if outputs is not None:
                self._take(outputs, bar)

    def _take(self, outputs: TokenOutputs, bar: tqdm) -> None:
        self._take_scores(outputs)
        entries = zip(
            outputs.request_ids.tolist(),
            outputs.token_ids.tolist(),
            outputs.finish.tolist(),
            outputs.cached.tolist(),
            strict=True,
        )
        for request_id, token_id, finish, num_cached in entries:
            if request_id not in self.samples:
                continue  # ended by a stop string while this token was under way
            output, completion, text, _ = self.samples[request_id]
            if not completion.token_ids:
                output.num_cached_tokens = max(output.num_cached_tokens, num_cached)
            if token_id >= 0:
                completion.token_ids.append(token_id)
            completion.text += text.take(token_id, finish)
            completion.finish_reason = text.finish_reason
            if text.finish_reason is not None:
                del self.samples[request_id]
                bar.update()
                if not finish:
                    self._llm._engine.abort([request_id])

    def _take_scores(self, outputs: TokenOutputs) -> None:
        for request_id, entry in outputs.prompt_scores.pack().entries() if outputs.prompt_scores else ():
            sample = self.samples[request_id]
            if sample.output.prompt_logprobs is not None:
                sample.output.prompt_logprobs.append(_cut(entry, sample.params.prompt_logprobs))
        for request_id, entry in outputs.scores.pack().entries() if outputs.scores else ():
            if request_id in self.samples and (found := self.samples[request_id].completion.logprobs) is not None:
                found.append(_cut(entry, self.samples[request_id].params.logprobs))

    def abort(self) -> None:
        """End what still runs, so that an interrupted call leaves nothing behind."""
        engine = self._llm._engine
        engine.abort(list(self.samples))
        while engine.has_work:
            engine.step()
