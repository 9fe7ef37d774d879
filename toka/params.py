"""How one request wants its tokens drawn: a frozen value, checked once at the edge (floor 1, no torch)."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from toka.errors import RequestError

MAX_SAMPLES_PER_REQUEST = 128
MAX_LOGPROBS = 20  # likeliest tokens that a request can ask for; the device always finds so many when anybody asks
MAX_LOGIT_BIASES = 300  # of one request, as in OpenAI's API
MAX_BAD_WORDS = 64  # spellings of them: a word may have one with a space before it and one without
MAX_BAD_WORD_TOKENS = 8
MAX_GRAMMAR_BYTES = 256 * 2**10  # of the source of a StructuredOutput
MAX_STOP_TOKEN_IDS = 16  # the width of the sampler's table of token ids that min_tokens holds back


class StructuredOutput(msgspec.Struct, frozen=True):
    """A grammar that the generated text has to fit, as llguidance takes it.

    json_schema: source is a JSON schema as JSON text (any object: `{"type": "object"}`). regex: a regular expression, matched as a
    whole. lark: a grammar in llguidance's dialect of Lark.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings of one request; the defaults are those of OpenAI's API.

    n: independent samples of one prompt.
    max_tokens: tokens to generate at most; None = as many as the context allows; 0 = only compute the prompt, for its logprobs.
    min_tokens: before so many tokens no end-of-sequence or stop token can be drawn and no stop string ends the request.
    temperature: 0 = greedy. top_k: 0 = off. top_p: 1 = off. min_p: 0 = off, else drop tokens whose probability is below
        min_p times that of the likeliest token. Filters apply in this order: temperature, top_k, top_p, min_p.
    seed: same seed, same prompt, same settings = same draws, whatever else runs (a token can differ only where rounding in the model's
        products, which changes with the batch, moves a draw across the border between two tokens); None = drawn per request.
    stop: strings that end the text, not part of it. stop_token_ids: token ids that end it (at most 16).
    ignore_eos: go on past the model's own end-of-sequence tokens.
    logprobs: with every generated token its logprob, and those of so many of the likeliest tokens; None = off, at most 20.
        Of the model's distribution: temperature and filters change them not.
    prompt_logprobs: the same for the prompt's tokens, but the first; the prompt is then computed whole, whatever the prefix cache holds.
    structured: only text of this grammar can be drawn; the text ends where the grammar does. None = any text.
    presence_penalty, frequency_penalty: taken off the logits of tokens that were generated before, once or for each time; 0 = off.
    repetition_penalty: divides the logits of tokens of the prompt and of what was generated (those below 0 it multiplies); 1 = off.
    logit_bias: (token id, what is added to its logit). bad_words: tokens that must not follow one another, as lists of ids.
    structured: only text of this grammar can be drawn, and the text ends where the grammar does; None = any text. The grammar goes before
        min_tokens and ignore_eos: these keep a text from ending while the grammar lets it go on, and no longer.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def adjusts_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0) or bool(self.logit_bias or self.bad_words)

    def check(self) -> SamplingParams:
        """Return self, or raise RequestError naming the field that is out of range."""
        _require(
            1 <= self.n <= MAX_SAMPLES_PER_REQUEST, "n", f"must be between 1 and {MAX_SAMPLES_PER_REQUEST}", self.n
        )
        if self.max_tokens is not None:
            _require(self.max_tokens >= 0, "max_tokens", "must be 0 or more", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "must be 0 or more", self.min_tokens)
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens", self.min_tokens)
        _require(
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0,
            "temperature",
            "must be a finite number from 0 to 100",
            self.temperature,
        )
        _require(0 <= self.top_k < 2**31, "top_k", "must be 0 (off) or more", self.top_k)
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1", self.top_p)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1", self.min_p)
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits", self.seed)
        for name, asked in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if asked is not None:
                _require(0 <= asked <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}", asked)
        _require(all(self.stop), "stop", "must not contain an empty string", "")
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"can hold at most {MAX_STOP_TOKEN_IDS} ids",
            len(self.stop_token_ids),
        )
        _require(all(0 <= t < 2**31 for t in self.stop_token_ids), "stop_token_ids", "must hold token ids", "")
        self._check_adjustments()
        return self

    def _check_adjustments(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, "must be between -2 and 2", value)
        _require(
            0.01 <= self.repetition_penalty <= 100.0,
            "repetition_penalty",
            "must be between 0.01 and 100",
            self.repetition_penalty,
        )
        biases, words = self.logit_bias, self.bad_words
        _require(len(biases) <= MAX_LOGIT_BIASES, "logit_bias", f"can hold at most {MAX_LOGIT_BIASES} ids", len(biases))
        _require(len({token for token, _ in biases}) == len(biases), "logit_bias", "must name each id once", "")
        _require(all(0 <= token < 2**31 for token, _ in biases), "logit_bias", "must be for token ids", "")
        _require(all(-100.0 <= bias <= 100.0 for _, bias in biases), "logit_bias", "must be from -100 to 100", "")
        _require(len(words) <= MAX_BAD_WORDS, "bad_words", f"can hold at most {MAX_BAD_WORDS} spellings", len(words))
        _require(
            all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in words),
            "bad_words",
            f"must be of 1 to {MAX_BAD_WORD_TOKENS} tokens each",
            max(map(len, words), default=0),
        )
        _require(all(0 <= token < 2**31 for word in words for token in word), "bad_words", "must hold token ids", "")


def _require(holds: bool, param: str, rule: str, value: Any) -> None:
    if not holds:
        raise RequestError(f"{param} {rule}, got {str(value)[:40]}.", param)
