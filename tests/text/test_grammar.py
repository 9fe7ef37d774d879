"""Grammars compiled for a vocabulary of one token a byte and a few words: masks, forced tokens, the end, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from toka.errors import ConfigError, RequestError
from toka.params import MAX_GRAMMAR_BYTES, StructuredOutput
from toka.text.grammar import MAX_ERROR_CHARS, GrammarState, GrammarVocabulary, MaskWriter, lark_of

VOCAB_SIZE = 300  # more than the tokenizer has
EOS, EOT = 258, 259


def tokenizer_json() -> str:
    """Bytes in the order of GPT-2's table, then "ab", "abc", <eos> and <eot>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: place for place, char in enumerate([*alphabet, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<eot>", special=True)])
    return tokenizer.to_str()


TOKENIZER = Tokenizer.from_str(tokenizer_json())


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer_json(), (EOS, EOT), VOCAB_SIZE)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def begin(vocabulary: GrammarVocabulary, pattern: str, *, ignores_eos: bool = False) -> GrammarState:
    return vocabulary.compile(StructuredOutput("regex", pattern)).fork(ignores_eos=ignores_eos)


def allowed(state: GrammarState | None) -> set[int]:
    masks = MaskWriter(VOCAB_SIZE).write([state])
    assert masks.shape == (1, -(-VOCAB_SIZE // 32)) and masks.dtype == np.int32
    return set(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist())


def test_a_mask_allows_what_may_follow(vocabulary: GrammarVocabulary) -> None:
    state = begin(vocabulary, "a(b|bcd)?x+")
    assert allowed(state) == {*ids("a"), *ids("ab"), *ids("abc")}
    state.take(ids("ab"))
    assert allowed(state) == {*ids("c"), *ids("x")} and not state.may_end
    state.take(ids("x"))
    assert allowed(state) == {*ids("x"), EOS, EOT} and state.may_end and not state.is_over


def test_forced_tokens_are_split_as_the_tokenizer_splits_them(vocabulary: GrammarVocabulary) -> None:
    state = begin(vocabulary, "abcabx[yz]")
    assert list(state.forced) == ids("abcabx") and allowed(state) == set(ids("abc"))
    state.take(ids("abcab"))
    assert list(state.forced) == ids("x") and allowed(state) == set(ids("x"))
    state.take(ids("x"))
    assert not state.forced and allowed(state) == {*ids("y"), *ids("z")}


def test_the_end(vocabulary: GrammarVocabulary) -> None:
    state = begin(vocabulary, "ab")
    state.take(ids("ab"))
    assert state.is_over and state.may_end and allowed(state) == {EOS, EOT}
    state.take([EOT])
    assert state.error is None


def test_a_text_that_goes_on_ends_only_where_nothing_else_can_follow(vocabulary: GrammarVocabulary) -> None:
    state = begin(vocabulary, "a{0,2}", ignores_eos=True)
    assert allowed(state) == set(ids("a"))
    state.take(ids("aa"))
    assert allowed(state) == {EOS, EOT}


def test_texts_of_one_grammar_do_not_know_of_each_other(vocabulary: GrammarVocabulary) -> None:
    grammar = vocabulary.compile(StructuredOutput("regex", "[ax]b*"))
    one, other = grammar.fork(ignores_eos=False), grammar.fork(ignores_eos=False)
    one.take(ids("x"))
    assert allowed(one) == {*ids("b"), EOS, EOT} and allowed(other) == {*ids("a"), *ids("x"), *ids("ab")}


def test_masks_of_many_texts_are_written_at_once(vocabulary: GrammarVocabulary) -> None:
    """Free, forced, over, failed, and none at all, whatever stands beside them."""
    free, forced, over, failed = (begin(vocabulary, pattern) for pattern in ("[xyz]b", "xyz", "", "[ab]x"))
    failed.take(ids("z"))
    assert failed.error is not None and "non-verbose" not in failed.error
    masks = MaskWriter(VOCAB_SIZE).write([free, None, forced, over, failed, free.fork(ignores_eos=False)])
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    assert bits[[1, 4]].all()
    assert [set(np.flatnonzero(bits[i]).tolist()) for i in (0, 2, 3, 5)] == [
        set(ids("xyz")), set(ids("x")), {EOS, EOT}, set(ids("xyz")),
    ]  # fmt: skip


def test_special_tokens_are_no_text(vocabulary: GrammarVocabulary) -> None:
    """Nor are ids that the tokenizer does not have, even where everything is allowed."""
    state = begin(vocabulary, "(.|\\n)*")
    assert max(allowed(state) - {EOS, EOT}) < 258
    named = vocabulary.compile(StructuredOutput("lark", 'start: <eot> "a"'))
    assert list(named.forced)[:1] == [EOT]


@pytest.mark.parametrize(
    ("kind", "source", "what"),
    [
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", "{", "JSON|EOF|parsing"),
        ("json_schema", "[1]", "object"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"type": "string", "format": "nope"}', "nope"),
        ("json_schema", '{"not": {"type": "string"}}', "not"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "not": {"type": "string"}}', "not"),
        ("json_schema", '{"$ref": "#"}', "valid"),
        ("json_schema", json.dumps({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "oneOf"),
        ("lark", "start: nothing", "nothing"),
        ("lark", "start: e\ne: e", "valid"),
        ("lark", 'start: "' + "a" * MAX_GRAMMAR_BYTES + '"', str(MAX_GRAMMAR_BYTES)),
    ],
)
def test_what_cannot_be_followed_is_refused(vocabulary: GrammarVocabulary, kind: str, source: str, what: str) -> None:
    with pytest.raises(RequestError, match=what) as refused:
        vocabulary.compile(StructuredOutput(kind, source))  # type: ignore[arg-type]
    assert len(refused.value.message) < MAX_ERROR_CHARS + 40


def test_a_text_is_tried_out_to_its_end_or_for_so_many_choices(vocabulary: GrammarVocabulary) -> None:
    whole, part, empty = (begin(vocabulary, pattern) for pattern in ("[abc]xyz[abc]", "[abc]{100}", ""))
    for state in (whole, part, empty):
        state.try_out(9)
        assert state.error is None
    assert whole.is_over and empty.is_over and not part.is_over
    bomb = begin(vocabulary, "[xy]((a{1000}){1000}){1000}")
    bomb.try_out(2)
    assert bomb.error is not None and "too many" in bomb.error


def test_white_space_has_a_bound(vocabulary: GrammarVocabulary) -> None:
    state = vocabulary.compile(StructuredOutput("json_schema", '{"type": "array", "items": {"type": "null"}}'))
    state.take(ids("[\n" + " " * 23))
    assert state.error is None and allowed(state) == {*ids("n"), *ids("]")}


def test_gbnf_becomes_lark_and_lark_stays() -> None:
    assert lark_of('start: "a"') == 'start: "a"'
    assert "start:" in lark_of('root ::= "a" | "b"')
    with pytest.raises(RequestError, match="not valid"):
        lark_of('root ::= "a')
    with pytest.raises(RequestError, match="not valid"):
        lark_of("root ::= " + "(" * 5000 + '"a"' + ")" * 5000)


def test_vocabularies_without_grammars() -> None:
    with pytest.raises(ConfigError, match="ends a text"):
        GrammarVocabulary(tokenizer_json(), (), VOCAB_SIZE)
    with pytest.raises(ConfigError, match="not possible with this tokenizer"):
        GrammarVocabulary('{"model": {}}', (EOS,), VOCAB_SIZE)
