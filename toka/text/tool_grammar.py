"""What a reply may be, as a grammar in llguidance's dialect of Lark: reasoning, then text, calls that fit their tools, or JSON.

Marks that are tokens of their own stand in the grammar by their ids, since text cannot match them. JSON is written as Python writes it
(`", "` and `": "`), which is how chat templates show it to models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toka.errors import RequestError
from toka.params import StructuredOutput
from toka.text.reasoning import ReasoningMarks
from toka.text.tool_calls import CallStyle

_JSON_OPTIONS = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_TEXT = "/(.|\\n)*/"
_SPACE = "/[ \\n]*/"
_UNESCAPED_SLASH = re.compile(r"(?<!\\)((?:\\\\)*)/")

TokenId = Callable[[str], int | None]
"""The id of a mark that is a token of its own, else None."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments, an object. strict: they must fit it."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class CallRules:
    """What is asked of the calls in a reply. choice: "auto" = text or calls; "required" = calls. parallel: more than one is allowed."""

    tools: Sequence[Tool]
    style: CallStyle
    choice: Literal["auto", "required"]
    parallel: bool


@dataclass(frozen=True)
class ReasoningRules:
    """What is asked of the reasoning. begun: the prompt says its first mark. budget: tokens at most, None = any number."""

    marks: ReasoningMarks
    begun: bool
    budget: int | None = None


def tool_call_grammar(
    tools: Sequence[Tool], style: CallStyle, choice: Literal["auto", "required"], parallel: bool, token_id: TokenId
) -> str:
    """The grammar of replies without reasoning that call these tools."""
    return reply_grammar(token_id, calls=CallRules(tools, style, choice, parallel))


def reply_grammar(
    token_id: TokenId,
    *,
    calls: CallRules | None = None,
    reasoning: ReasoningRules | None = None,
    structured: StructuredOutput | None = None,
) -> str:
    """The grammar of replies. structured: what the text has to fit where there are no calls; None = any text.

    Raises RequestError naming the field for what no grammar can say.
    """
    grammar = _Grammar(token_id)
    text = grammar.add("text", _TEXT if structured is None else _structured(structured))
    body = text if calls is None else grammar.add("body", _body(grammar, calls, None if structured is None else text))
    if reasoning is not None:
        body = f"{_reasoning(grammar, reasoning)} {grammar.add('space', _SPACE)} {body}"
    return grammar.source(body)


class _Grammar:
    """Rules under construction."""

    def __init__(self, token_id: TokenId):
        self._token_id = token_id
        self._rules: list[str] = []

    def add(self, name: str, expansion: str, options: str = "") -> str:
        """A rule, or a terminal where name is in capitals; returns its name."""
        self._rules.append(f"{name}{options}: {expansion}")
        return name

    def mark(self, text: str) -> str:
        """A mark, as a token if it is one."""
        token_id = self._token_id(text)
        return _literal(text) if token_id is None else f"<[{token_id}]>"

    @property
    def num_rules(self) -> int:
        return len(self._rules)

    def is_token(self, text: str) -> bool:
        return self._token_id(text) is not None

    def source(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules]) + "\n"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, **_JSON_OPTIONS}, ensure_ascii=False)


def _structured(structured: StructuredOutput) -> str:
    if structured.kind == "json_schema":
        schema = json.loads(structured.source)
        return _json(schema) if isinstance(schema, dict) else "%json " + structured.source
    if structured.kind == "regex":
        return "/" + _UNESCAPED_SLASH.sub(r"\1\\/", structured.source).replace("\n", "\\n") + "/"
    raise RequestError(
        "structured_outputs.grammar cannot be combined with tools or with a model that reasons first.",
        "structured_outputs",
    )


def _reasoning(grammar: _Grammar, rules: ReasoningRules) -> str:
    """The reasoning with its marks; optional unless the prompt began it."""
    marks, budget = rules.marks, rules.budget
    if grammar.is_token(marks.end):
        limit = "" if budget is None else f"[max_tokens={budget}]"
        inside = "" if budget == 0 else grammar.add("reasoning", _TEXT, limit)
        whole = f"{inside} {grammar.mark(marks.end)}"
    elif budget is None:
        whole = grammar.add("reasoning", _TEXT, f"[suffix={_literal(marks.end)}]")
    else:
        raise RequestError("reasoning_budget: this model's end of reasoning is not one token.", "reasoning_budget")
    return whole if rules.begun else f"({grammar.mark(marks.begin)} {whole})?"


# --------------------------------------------------------------------------------------------------------------- calls


def _body(grammar: _Grammar, rules: CallRules, structured: str | None) -> str:
    """Calls or, where these are not required, text; structured: the rule of the text that is allowed instead of any."""
    style = rules.style
    section = grammar.add("section", _SECTIONS[style.name](grammar, rules))
    if style.bare:
        marked = [f"{grammar.mark(mark)} {section}" for mark in style.marks if grammar.is_token(mark)]
        calls = " | ".join([section, *marked])
        text = structured or grammar.add("other_text", f"/[ \\n]*([^ \\n\\{style.bare}](.|\\n)*)?/")
        return calls if rules.choice == "required" else f"{calls} | {text}"
    [mark] = style.marks
    call = grammar.add("call", f"{grammar.mark(mark)} {section}")
    several = rules.parallel and style.repeats_mark
    calls = f'{call} ("\\n"? {call})*' if several else call
    if rules.choice == "required":
        return calls
    if structured is not None:
        return f"{calls} | {structured}"
    if grammar.is_token(mark):
        return f"text ({call} text)*" if several else f"text ({call})?"
    grammar.add("TEXT", _TEXT)
    head = grammar.add("head", f"TEXT {_literal(mark)}", "[lazy]")
    return f"({head} {section})* text" if several else f"{head} {section} | text"


def _hermes(grammar: _Grammar, rules: CallRules) -> str:
    return f'"\\n" ({_any_object(grammar, rules)}) "\\n" {grammar.mark("</tool_call>")}'


def _llama3(grammar: _Grammar, rules: CallRules) -> str:
    """Objects that are JSON to the parser from the first brace on, so that an answer in JSON can stand beside them."""
    return " | ".join(grammar.add(f"object_{grammar.num_rules}", _json(_call_schema(tool))) for tool in rules.tools)


def _call_schema(tool: Tool) -> dict[str, Any]:
    properties = {"name": {"const": tool.name}, "parameters": _moved_refs(tool.parameters, "#/properties/parameters")}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _moved_refs(schema: Any, root: str) -> Any:
    """The schema with its references to itself as they must be when it stands at root."""
    if isinstance(schema, list):
        return [_moved_refs(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved_refs(value, root) for key, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = root + ref[1:]
    return moved


def _mistral(grammar: _Grammar, rules: CallRules) -> str:
    if rules.style.repeats_mark:
        arguments = grammar.mark("[ARGS]")
        return " | ".join(f"{_literal(tool.name)} {arguments} {_arguments(grammar, tool)}" for tool in rules.tools)
    return '" "? ' + _list_of(grammar.add("object", _any_object(grammar, rules)), rules)


def _pythonic(grammar: _Grammar, rules: CallRules) -> str:
    calls = [f'{_literal(tool.name + "(")} {_keywords(grammar, tool)} ")"' for tool in rules.tools]
    return _list_of(grammar.add("python_call", " | ".join(calls)), rules)


_SECTIONS = {"hermes": _hermes, "llama3_json": _llama3, "mistral": _mistral, "pythonic": _pythonic}


def _list_of(call: str, rules: CallRules) -> str:
    return f'"[" {call} (", " {call})* "]"' if rules.parallel else f'"[" {call} "]"'


def _any_object(grammar: _Grammar, rules: CallRules) -> str:
    def call(tool: Tool) -> str:
        head = f'{{"name": {_literal(tool.name)}, "arguments": '
        return f'{_literal(head)} {_arguments(grammar, tool)} "}}"'

    return " | ".join(map(call, rules.tools))


def _arguments(grammar: _Grammar, tool: Tool) -> str:
    return grammar.add(f"arguments_{grammar.num_rules}", _json(tool.parameters))


def _keywords(grammar: _Grammar, tool: Tool) -> str:
    """The arguments as Python's keywords: those that are required, then any of the others."""
    schema = tool.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "patternProperties"}:
        raise RequestError(
            f"tools: the parameters of {tool.name} must be plain properties with this model, whose calls are Python.",
            "tools",
        )
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def keyword(name: str) -> str:
        value = properties[name] if isinstance(properties[name], dict) else {}
        return f"{_literal(name + '=')} {grammar.add(f'value_{grammar.num_rules}', _json({**value, **shared}))}"

    always = [keyword(name) for name in properties if name in required]
    maybe = [keyword(name) for name in properties if name not in required]
    if always:
        return ' ", " '.join(always) + "".join(f' (", " {each})?' for each in maybe)
    starts = [each + "".join(f' (", " {later})?' for later in maybe[i + 1 :]) for i, each in enumerate(maybe)]
    return f"({' | '.join(starts)})?" if starts else ""
