"""Tools for models whose chat template knows of none: told in the system message, called and answered in the form of Hermes.

Models that were not trained for tools can so be held to them by grammar (tool_choice "required" or a name); whether they choose
well by themselves is another matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from toka.text.chat_template import text_of

_INTRODUCTION = """\
You can call these functions; each line describes one, its parameters by a JSON schema:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as JSON between these marks, once for each call:
<tool_call>
{{"name": "<function name>", "arguments": {{<arguments>}}}}
</tool_call>
Results come back between <tool_response> and </tool_response>."""


def with_tools_in_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with tools, calls and results as text; nothing but the roles system, user and assistant is left.

    messages: as OpenAI has them, content a string, text parts or None.
    """
    told: list[dict[str, Any]] = []
    results: dict[str, Any] | None = None  # the message that holds those of the latest calls
    for message in messages:
        if message["role"] == "tool":
            block = f"<tool_response>\n{text_of(message)}\n</tool_response>"
            if results is None:
                results = {"role": "user", "content": block}
                told.append(results)
            else:  # one message, since many templates want the roles to take turns
                results["content"] += "\n" + block
            continue
        results = None
        if calls := message.get("tool_calls"):
            said = [text] if (text := text_of(message)) else []
            told.append({"role": message["role"], "content": "\n".join([*said, *map(_call_text, calls)])})
        else:
            told.append(dict(message))
    if tools:
        introduction = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if told and told[0]["role"] in ("system", "developer"):
            told[0]["content"] = f"{text_of(told[0])}\n\n{introduction}"
        else:
            told.insert(0, {"role": "system", "content": introduction})
    return told


def _call_text(call: Mapping[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
