"""Calls that are required: a model that was never taught any writes what its tools' schemas allow, and nothing else."""

from __future__ import annotations

import json

import jsonschema
import pytest

from toka import LLM, SamplingParams
from toka.params import StructuredOutput
from toka.text.reply_parser import ReplyFormat, ReplyParser
from toka.text.reply_parts import Message
from toka.text.tool_calls import STYLES
from toka.text.tool_grammar import Tool, tool_call_grammar
from toka.text.tool_prompt import with_tools_in_text

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    Tool("get_weather", "The weather in a city.", WEATHER),
    Tool("now", "The time.", {"type": "object", "properties": {}, "additionalProperties": False}),
]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}


@pytest.mark.parametrize("style", list(STYLES))
def test_required_calls_fit_their_schemas(smollm2_llm: LLM, style: str) -> None:
    """Greedily, and drawn at a high temperature beside requests that are free."""
    shown = [{"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in TOOLS]
    messages = with_tools_in_text([{"role": "user", "content": "How is the weather in Oslo?"}], shown)
    template = smollm2_llm.tokenizer.chat_template
    assert template is not None
    prompt = smollm2_llm.tokenizer.encode(template.render(messages), add_special_tokens=False)
    grammar = tool_call_grammar(TOOLS, STYLES[style], "required", False, smollm2_llm.tokenizer.mark_id)
    held = {"structured": StructuredOutput("lark", grammar), "max_tokens": 150}
    settings = [
        SamplingParams(temperature=0.0, **held),
        SamplingParams(temperature=1.5, n=4, seed=7, **held),
        SamplingParams(max_tokens=30, temperature=1.0, frequency_penalty=1.0),
    ]
    outputs = smollm2_llm.generate([prompt] * 3, settings, use_tqdm=False)
    for completion in (*outputs[0].completions, *outputs[1].completions):
        parser, message = ReplyParser(ReplyFormat(calls=STYLES[style], tool_names=list(SCHEMAS))), Message()
        message.add(parser.push(completion.text) + parser.finish())
        assert completion.finish_reason == "stop" and message.content is None, completion.text
        [call] = message.tool_calls
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
