"""The grammars of replies, tried on llguidance itself: what they let through, and at which token they say no."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from toka.errors import RequestError
from toka.params import StructuredOutput
from toka.text.reasoning import ReasoningMarks
from toka.text.reply_parser import ReplyFormat, ReplyParser
from toka.text.reply_parts import Message
from toka.text.tokenizer import _byte_of_char
from toka.text.tool_calls import STYLES, CallStyle, style_called
from toka.text.tool_grammar import CallRules, ReasoningRules, Tool, reply_grammar, tool_call_grammar

MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>"]
THINK = ReasoningMarks("<think>", "</think>")
WEATHER = Tool(
    "get_weather",
    "",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    },
)
NOW = Tool("now", "", {"type": "object", "properties": {}, "additionalProperties": False})
OSLO = '{"city": "Oslo \\"é\\" {", "days": 3}'


class Vocabulary:
    """One token a byte and, if wanted, one a mark."""

    def __init__(self, marks: list[str]):
        backend = Tokenizer(BPE(vocab=_byte_of_char(), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<eos>", special=True)])
        backend.add_tokens([AddedToken(mark, special=mark.startswith("["), normalized=False) for mark in marks])
        self.backend = backend
        self.marks = marks
        self.eos = backend.token_to_id("<eos>")
        self.for_guidance = LLTokenizer(backend.to_str(), n_vocab=backend.get_vocab_size(), eos_token=self.eos)

    def token_id(self, mark: str) -> int | None:
        return self.backend.token_to_id(mark) if mark in self.marks else None

    def matches(self, grammar: str, text: str) -> bool:
        """Whether text, and the end behind it, fits."""
        assert not LLMatcher.validate_grammar(grammar, self.for_guidance)
        tokens = [*self.backend.encode(text, add_special_tokens=False).ids, self.eos]
        matcher = LLMatcher(self.for_guidance, grammar)
        return matcher.try_consume_tokens(tokens) >= len(tokens) - matcher.is_stopped()


VOCABULARIES = [Vocabulary(MARKS), Vocabulary([])]
either_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["marks are tokens", "marks are text"])


def _object(arguments: str, name: str = "get_weather", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def _hermes(arguments: str, name: str = "get_weather") -> str:
    return f"<tool_call>\n{_object(arguments, name)}\n</tool_call>"


MISTRAL_11 = style_called("mistral", "[ARGS]")
NAMED = {"get_weather": "[TOOL_CALLS]get_weather[ARGS]", "now": "[TOOL_CALLS]now[ARGS]"}
# style, a call with these arguments, another call, both of them if there may be two
WAYS: list[tuple[CallStyle, Callable[[str], str], str, Callable[[str, str], str] | None]] = [
    (STYLES["hermes"], _hermes, _hermes("{}", "now"), lambda a, b: f"{a}\n{b}"),
    (
        STYLES["mistral"],
        lambda arguments: f"[TOOL_CALLS][{_object(arguments)}]",
        f"[TOOL_CALLS] [{_object('{}', 'now')}]",
        lambda a, b: f"{a[:-1]}, {b[len('[TOOL_CALLS] [') :]}",
    ),
    (MISTRAL_11, lambda arguments: NAMED["get_weather"] + arguments, NAMED["now"] + "{}", lambda a, b: a + b),
    (
        STYLES["llama3_json"],
        lambda arguments: _object(arguments, key="parameters"),
        _object("{}", "now", "parameters"),
        None,
    ),
]
every_way = pytest.mark.parametrize(
    ("style", "call", "other", "both"), WAYS, ids=["hermes", "mistral", "v11", "llama3"]
)


@either_vocabulary
@every_way
def test_required_calls(vocabulary: Vocabulary, style, call, other, both) -> None:
    grammar = tool_call_grammar([WEATHER, NOW], style, "required", True, vocabulary.token_id)
    for good in (call(OSLO), other, call('{"city": ""}'), *([both(call(OSLO), other)] if both else [])):
        assert vocabulary.matches(grammar, good), good
    for bad in (
        "",
        "Hello",
        call("{}"),
        call('{"city": 3}'),
        call('{"city": "x", "days": 10}'),
        call(OSLO)[:-2],
        "x" + other,
    ):
        assert not vocabulary.matches(grammar, bad), bad


@either_vocabulary
@every_way
def test_what_the_grammar_lets_through_is_what_the_parser_reads(
    vocabulary: Vocabulary, style, call, other, both
) -> None:
    grammar = tool_call_grammar([WEATHER, NOW], style, "required", True, vocabulary.token_id)
    reply = both(call(OSLO), other) if both else call(OSLO)
    assert vocabulary.matches(grammar, reply)
    parser, message = ReplyParser(ReplyFormat(calls=style, tool_names=("get_weather", "now"))), Message()
    message.add(parser.push(reply) + parser.finish())
    assert json.loads(message.tool_calls[0].arguments) == {"city": 'Oslo "é" {', "days": 3}
    assert [each.name for each in message.tool_calls] == ["get_weather", *(["now"] if both else [])]


@either_vocabulary
@every_way
def test_without_parallel_there_is_one(vocabulary: Vocabulary, style, call, other, both) -> None:
    for choice in ("required", "auto"):
        grammar = tool_call_grammar([WEATHER, NOW], style, choice, False, vocabulary.token_id)
        assert vocabulary.matches(grammar, call(OSLO))
        assert not both or not vocabulary.matches(grammar, both(call(OSLO), other))


@either_vocabulary
@every_way
def test_auto_allows_text_and_holds_calls_to_their_schemas(vocabulary: Vocabulary, style, call, other, both) -> None:
    grammar = tool_call_grammar([WEATHER, NOW], style, "auto", True, vocabulary.token_id)
    for good in ("", "Hello, { [1] }", call(OSLO)):
        assert vocabulary.matches(grammar, good), good
    assert not vocabulary.matches(grammar, call('{"city": 3}'))
    if not style.bare:
        assert vocabulary.matches(grammar, f"I look.\n{call(OSLO)}")
        assert not vocabulary.matches(grammar, f"I look.\n{call('{}')}")


@either_vocabulary
def test_python_calls(vocabulary: Vocabulary) -> None:
    tools = [WEATHER, NOW, Tool("opt", "", {"properties": {"a": {"type": "boolean"}, "b": {}, "c": {"type": "null"}}})]
    grammar = tool_call_grammar(tools, STYLES["pythonic"], "required", True, vocabulary.token_id)
    for good in (
        '[get_weather(city="Oslo", days=3)]',
        '[get_weather(city="Oslo", unit="C"), now()]',
        "[opt()]",
        "[opt(a=true)]",
        '[opt(b={"x": [1]}, c=null)]',
        "[opt(a=false, c=null)]",
    ):
        assert vocabulary.matches(grammar, good), good
        parser = ReplyParser(ReplyFormat(calls=STYLES["pythonic"], tool_names=[tool.name for tool in tools]))
        parser.push(good)
        assert parser.num_calls == good.count("(")
    for bad in (
        "[get_weather()]",
        "[get_weather(city=3)]",
        '[get_weather(city="", days=10)]',
        "[]",
        "[opt(c=null, a=true)]",
        "x",
    ):
        assert not vocabulary.matches(grammar, bad), bad
    with pytest.raises(RequestError, match="plain properties"):
        tool_call_grammar([Tool("f", "", {"anyOf": []})], STYLES["pythonic"], "required", True, vocabulary.token_id)


@either_vocabulary
@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_comes_first(vocabulary: Vocabulary, begun: bool) -> None:
    grammar = reply_grammar(
        vocabulary.token_id,
        calls=CallRules([NOW], STYLES["hermes"], "required", True),
        reasoning=ReasoningRules(THINK, begun),
    )
    call = _hermes("{}", "now")
    thought = "hm </b>\n</think>\n\n"
    assert vocabulary.matches(grammar, ("" if begun else "<think>") + thought + call)
    assert not vocabulary.matches(grammar, ("" if begun else "<think>") + "hm" + call)
    assert vocabulary.matches(grammar, call) is not begun


def test_a_reasoning_budget_forces_the_end_mark() -> None:
    vocabulary = VOCABULARIES[0]
    grammar = reply_grammar(vocabulary.token_id, reasoning=ReasoningRules(THINK, True, 5))
    assert vocabulary.matches(grammar, "hmmmm</think>\nAny text {}")
    assert vocabulary.matches(grammar, "hm</think>Any")
    assert not vocabulary.matches(grammar, "hmmmmm</think>Any")
    matcher = LLMatcher(vocabulary.for_guidance, grammar)
    assert matcher.try_consume_tokens(list(b"hmmmm")) == 5
    assert matcher.compute_ff_tokens() == [vocabulary.token_id("</think>")]
    none_at_all = reply_grammar(vocabulary.token_id, reasoning=ReasoningRules(THINK, True, 0))
    assert vocabulary.matches(none_at_all, "</think>Any") and not vocabulary.matches(none_at_all, "h</think>Any")
    with pytest.raises(RequestError, match="not one token"):
        reply_grammar(VOCABULARIES[1].token_id, reasoning=ReasoningRules(THINK, True, 5))


@either_vocabulary
def test_an_answer_in_json_or_a_call(vocabulary: Vocabulary) -> None:
    """What agents with tools and an output type ask for."""
    answer = StructuredOutput(
        "json_schema",
        json.dumps({"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"]}),
    )
    for style, call in (
        (STYLES["hermes"], _hermes("{}", "now")),
        (STYLES["llama3_json"], _object("{}", "now", "parameters")),
    ):
        rules = CallRules([NOW], style, "auto", True)
        grammar = reply_grammar(vocabulary.token_id, calls=rules, structured=answer)
        assert vocabulary.matches(grammar, '{"answer": 42}') and vocabulary.matches(grammar, call)
        assert not vocabulary.matches(grammar, "42")
    reasoned = reply_grammar(vocabulary.token_id, reasoning=ReasoningRules(THINK, True), structured=answer)
    assert vocabulary.matches(reasoned, 'hm</think>\n\n{"answer": 42}')
    for source in ("a/b+", r"a\/b+"):
        regex = reply_grammar(
            vocabulary.token_id, reasoning=ReasoningRules(THINK, True), structured=StructuredOutput("regex", source)
        )
        assert vocabulary.matches(regex, "hm</think>a/bb") and not vocabulary.matches(regex, "hm</think>ab")
    with pytest.raises(RequestError, match="cannot be combined"):
        reply_grammar(vocabulary.token_id, structured=StructuredOutput("lark", "start: /a/"))


def test_schemas_that_are_no_schemas_are_left_to_the_engine_to_refuse() -> None:
    grammar = tool_call_grammar(
        [Tool("f", "", {"properties": {"a": {"type": "nonsense"}}})], STYLES["hermes"], "required", True, lambda _: None
    )
    assert "nonsense" in LLMatcher.validate_grammar(grammar, VOCABULARIES[0].for_guidance)
