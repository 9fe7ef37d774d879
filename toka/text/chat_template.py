"""Render a conversation as the text of a prompt, with the Jinja template that comes with the model.

The environment is the one that transformers gives its templates: sandboxed, immutable, blocks trimmed, loop controls, a
`generation` tag, `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toka.errors import ConfigError, RequestError

_REASONING_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # under these names templates look for an earlier reply's reasoning


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; rendering ignores the marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class ChatTemplate:
    """One model's template. source: its Jinja text. special_tokens: names the template may use (bos_token, ...) and values.

    variables: names that the template reads and does not set, such as `tools` if it knows of tools. Raises ConfigError if source is not
    valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except TemplateSyntaxError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text for messages (`role`, `content`, `tool_calls`, ... as OpenAI has them; content a string or text parts).

        tools: as OpenAI has them. continue_final_message: the prompt ends in the middle of the last message, with its content.
        variables: further names for the template, such as enable_thinking. Raises RequestError naming `messages` if the
        template refuses them (say, two user messages in a row) or fails on them.
        """
        plain = [self._plain(message) for message in messages]
        end = ""
        if continue_final_message:
            end = f"end{secrets.token_hex(16)}"  # templates may trim the content, or put something behind it
            plain[-1]["content"] += end
        try:
            text = self._template.render(
                **{**self._special_tokens, "tools": list(tools) or None, "documents": None, **(variables or {})},
                messages=plain,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", "messages") from error
        except Exception as error:  # whatever a template's code raises on data it does not expect
            kind = type(error).__name__
            raise RequestError(f"the model's chat template cannot take these messages ({kind})", "messages") from error
        if not end:
            return text
        if end not in text:
            raise RequestError("the model's chat template does not show the last message.", "continue_final_message")
        return text[: text.rindex(end)]

    def _plain(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message as templates know it: its text parts joined by newlines (templates before 2024 know strings only), the arguments
        of its calls as objects, its reasoning under all names."""
        plain = {key: value for key, value in message.items() if value is not None or key == "content"}
        if isinstance(plain.get("content"), list):
            plain["content"] = text_of(message)
        if plain.get("role") == "developer" and "developer" not in self.source:
            plain["role"] = "system"  # OpenAI's newer word for it
        if calls := plain.get("tool_calls"):
            plain["tool_calls"] = [_with_decoded_arguments(call) for call in calls]
        if reasoning := next((plain[key] for key in _REASONING_KEYS if plain.get(key)), None):
            plain.update(dict.fromkeys(_REASONING_KEYS, reasoning))
        return plain


def text_of(message: Mapping[str, Any]) -> str:
    """The content of a message as one text; "" if it has none."""
    content = message.get("content")
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _with_decoded_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object; what a model once wrote that is none stays text."""
    function = dict(call["function"])
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {**call, "function": function}
