"""Grammars that limit what is generated: compiled, followed token by token, turned into masks (llguidance, no torch).

A grammar is compiled for a vocabulary into a `GrammarState` at its beginning, which is copied for every text. Fuel and sizes are limited
(LIMITS), so that neither compiling nor a step of a text costs much beyond what a schema of use needs. What these limits let through all
the same takes time or stack that cannot be taken back within a process: whoever compiles what strangers send does that in another one
first (server/grammar_checker.py).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from llguidance.numpy import fill_next_token_bitmask_par

from toka.errors import ConfigError, RequestError
from toka.params import MAX_GRAMMAR_BYTES, StructuredOutput
from toka.plan import TokenMasks

MAX_ERROR_CHARS = 300
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,  # about 3 ms
    max_lexer_states=50_000,  # 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,  # they would tell of the parser's inside
)
# As pretty-printed JSON has it; without a bound a model may write nothing else for ever.
_WHITESPACE = r"[ \t\n]{1,24}"
_MAX_MASK_THREADS = 8


class GrammarVocabulary:
    """What grammars must know of a model's tokens. Safe to call from several threads.

    tokenizer_json: as Tokenizer.to_json gives it. eos_token_ids: those that end a text. vocab_size: of the model, which may have more ids
    than the tokenizer. Raises ConfigError if the tokenizer is of a kind that has no grammars, or if nothing ends a text.
    """

    def __init__(self, tokenizer_json: str, eos_token_ids: Sequence[int], vocab_size: int):
        self.eos_token_ids = tuple(eos_token_ids)
        if not self.eos_token_ids:
            raise ConfigError("structured output needs a token that ends a text, and this model's tokenizer names none")
        try:
            self._tokens = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(self.eos_token_ids))
        except Exception as error:  # llguidance raises bare ValueError and RuntimeError
            raise ConfigError(f"structured output is not possible with this tokenizer: {_short(str(error))}") from error

    def compile(self, structured: StructuredOutput) -> GrammarState:
        """The grammar at its beginning. Raises RequestError, without a field's name, if it is wrong or too large."""
        num_bytes = len(structured.source.encode())
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise RequestError(f"The grammar has {num_bytes} bytes; {MAX_GRAMMAR_BYTES} are allowed.")
        try:
            matcher = LLMatcher(self._tokens, _llguidance_source(structured), log_level=0, limits=LIMITS)
        except ValueError as error:  # a source that is no JSON
            raise RequestError(f"The grammar is not valid: {_short(str(error))}") from None
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # only this finds out that nothing fits, or that the first step is too much
        if trial.is_error():
            raise RequestError(f"The grammar is not valid: {_short(trial.get_error())}")
        return GrammarState(matcher, self, matcher.compute_ff_tokens())


class GrammarState:
    """Where one text stands in its grammar.

    forced: the tokens that must come next, as far as the grammar leaves no choice and their split into tokens is certain.
    ignores_eos: the text does not end while the grammar allows anything else.
    """

    __slots__ = ("_matcher", "_vocabulary", "forced", "ignores_eos")

    def __init__(
        self, matcher: LLMatcher, vocabulary: GrammarVocabulary, forced: Iterable[int], *, ignores_eos: bool = False
    ):
        self._matcher, self._vocabulary = matcher, vocabulary
        self.forced = deque(forced)
        self.ignores_eos = ignores_eos

    def fork(self, *, ignores_eos: bool) -> GrammarState:
        """Another text that stands at the same place."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary, self.forced, ignores_eos=ignores_eos)

    @property
    def error(self) -> str | None:
        """Why this text cannot be followed any further: a token that the grammar does not allow, or one of its limits."""
        return _short(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def take(self, token_ids: Iterable[int]) -> None:
        """The text goes on with these tokens. See `error` for whether it could."""
        for token_id in token_ids:
            if not self._matcher.consume_token(token_id):
                self.forced.clear()
                return
            if self.forced and self.forced.popleft() != token_id:
                self.forced.clear()
        if not self.forced and not self._matcher.is_stopped():
            self.forced.extend(self._matcher.compute_ff_tokens())

    def try_out(self, num_choices: int) -> None:
        """Let the text go on at random, over so many places where there is a choice. See `error` for whether it could."""
        random = np.random.default_rng(0)
        for _ in range(num_choices):
            self.take(list(self.forced))
            if self.error is not None or self.is_over:
                return
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self.take([int(random.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))])

    def _finish_mask(self, words_W: TokenMasks) -> None:
        """Where the text does not end while it may go on, take the end out of the mask that llguidance wrote."""
        if not self.ignores_eos or not self.may_end:
            return
        before = words_W.copy()
        for token_id in self._vocabulary.eos_token_ids:
            _bits(words_W)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        if not words_W.any():
            words_W[:] = before


class MaskWriter:
    """Writes the masks of many texts at once, on threads of its own and without Python's lock."""

    def __init__(self, vocab_size: int):
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(min(max(1, (os.cpu_count() or 1) // 2), _MAX_MASK_THREADS))

    def write(self, states: Sequence[GrammarState | None]) -> TokenMasks:
        """One mask a text: what may follow it. None, and a text that cannot be followed any further: anything may."""
        masks_CW = np.full((len(states), self._num_words), -1, dtype=np.int32)
        free = [(place, state) for place, state in enumerate(states) if state is not None and not state.forced]
        if free:
            fill_next_token_bitmask_par(self._executor, [(state._matcher, place) for place, state in free], masks_CW)
        for place, state in enumerate(states):
            if state is None:
                continue
            if state.error is not None:
                masks_CW[place] = -1
            elif state.forced:
                masks_CW[place] = 0
                _bits(masks_CW[place])[state.forced[0] // 32] = np.uint32(1 << state.forced[0] % 32)
            else:
                state._finish_mask(masks_CW[place])
        return masks_CW


def lark_of(grammar: str) -> str:
    """A grammar of either notation in that of Lark. Raises RequestError, without a field's name, for GBNF that cannot be read."""
    try:
        converted: str = any_to_lark(grammar)
    except (GbnfToLarkError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise RequestError(f"The grammar is not valid: {_short(str(error))}") from None
    return converted


def _bits(words_W: TokenMasks) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    """The same memory, without a sign."""
    return words_W.view(np.uint32)


def _llguidance_source(structured: StructuredOutput) -> str:
    """The grammar in llguidance's own form. ValueError if a schema is no JSON."""
    if structured.kind == "json_schema":
        # A schema may ask for other whitespace (x-guidance), but not for keywords to be ignored or only approximated.
        return LLMatcher.grammar_from_json_schema(
            structured.source,
            defaults={"whitespace_pattern": _WHITESPACE},
            overrides={"lenient": False, "coerce_one_of": False},
        )
    if structured.kind == "regex":
        return LLMatcher.grammar_from_regex(structured.source)
    return LLMatcher.grammar_from_lark(structured.source)


def _short(message: str) -> str:
    """The first lines of what llguidance says, without what stands for its inside."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."
