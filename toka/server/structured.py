"""What the text of an answer has to be: `response_format` and `structured_outputs` as one grammar."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from toka.errors import RequestError
from toka.params import StructuredOutput
from toka.server.grammar_checker import GrammarKind
from toka.server.schemas import GenerationFields, ResponseFormat, StructuredOutputs
from toka.server.serving import Serving

_ANY_OBJECT = '{"type": "object"}'


async def structured_output(serving: Serving, fields: GenerationFields) -> StructuredOutput | None:
    """The checked grammar that a request asks for; None if it asks for none. RequestError names the field at fault."""
    asked = _asked_for(fields)
    if asked is None:
        return None
    kind, source, param = asked
    return await serving.grammars.check(kind, source, param, serving.check_admission().vocab_size)


def _asked_for(fields: GenerationFields) -> tuple[GrammarKind, str, str] | None:
    """The grammar's kind and source, and the field that holds it."""
    by_format = None if fields.response_format is UNSET else _by_format(fields.response_format)
    by_outputs = None if fields.structured_outputs is UNSET else _by_outputs(fields.structured_outputs)
    if by_format is not None and by_outputs is not None:
        raise RequestError(
            "response_format and structured_outputs both say what the text has to be.", "structured_outputs"
        )
    if by_format is not None:
        return *by_format, "response_format"
    if by_outputs is not None:
        return *by_outputs, "structured_outputs"
    return None


def _by_format(wanted: ResponseFormat) -> tuple[GrammarKind, str] | None:
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        rule = "is required with" if wanted.type == "json_schema" else "is only allowed with"
        raise RequestError(f"response_format.json_schema {rule} type json_schema.", "response_format")
    if wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return "json_schema", _ANY_OBJECT
    return "json_schema", _as_text(wanted.json_schema.schema, "response_format")


def _by_outputs(wanted: StructuredOutputs) -> tuple[GrammarKind, str]:
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    if len(given) != 1:
        rule = f"not {' and '.join(given)} together" if given else "which is missing"
        raise RequestError(
            f"structured_outputs holds one of json, regex, choice and grammar, {rule}.", "structured_outputs"
        )
    if wanted.json is not None:
        return "json_schema", wanted.json if isinstance(wanted.json, str) else _as_text(
            wanted.json, "structured_outputs"
        )
    if wanted.regex is not None:
        return "regex", wanted.regex
    if wanted.grammar is not None:
        return "grammar", wanted.grammar
    if not wanted.choice:
        raise RequestError("structured_outputs.choice must hold at least one text.", "structured_outputs")
    return "lark", "start: " + " | ".join(msgspec.json.encode(text).decode() for text in wanted.choice)


def _as_text(schema: dict[str, object], param: str) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except RecursionError:
        raise RequestError(f"{param}: the schema nests too deeply.", param) from None
