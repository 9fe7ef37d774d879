"""From a conversation, as any of the chat endpoints takes it, to what the engine needs: a prompt, a grammar, a way to read the reply."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import UNSET

from toka.errors import ConfigError, RequestError
from toka.params import StructuredOutput
from toka.server.schemas import ChatCompletionRequest, ChatMessage, TokenizeRequest, ToolDefinition
from toka.text.chat_template import ChatTemplate, text_of
from toka.text.reply_formats import ModelReplies
from toka.text.reply_reader import ReplyReading
from toka.text.tool_grammar import CallRules, ReasoningRules, Tool, reply_grammar
from toka.text.tool_prompt import with_tools_in_text

if TYPE_CHECKING:
    from toka.server.serving import Serving

MAX_TEMPLATE_CHARS = 200_000
MAX_SCHEMA_DEPTH = 64


@dataclass(frozen=True)
class ToolUse:
    """tools: shown to the model. choice: "required" = the reply is calls. allowed: names that may be called; None = all."""

    tools: Sequence[Tool] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    allowed: Sequence[str] | None = None
    parallel: bool = True

    @property
    def callable_tools(self) -> list[Tool]:
        if self.choice == "none":
            return []
        return [tool for tool in self.tools if self.allowed is None or tool.name in self.allowed]

    def check(self) -> ToolUse:
        """Return self, or raise RequestError naming the field that is wrong."""
        names = [tool.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RequestError(f"tools: {twice} is there twice.", "tools")
        for tool in self.tools:
            if tool.parameters.get("type") != "object":
                raise RequestError(f"tools: the parameters of {tool.name} must be a schema of type object.", "tools")
            if _depth(tool.parameters) > MAX_SCHEMA_DEPTH:
                raise RequestError(f"tools: the parameters of {tool.name} are nested too deeply.", "tools")
        if missing := next((name for name in self.allowed or () if name not in names), None):
            raise RequestError(f"tool_choice: there is no tool {missing[:80]}.", "tool_choice")
        if self.choice == "required" and not self.callable_tools:
            raise RequestError("tool_choice asks for a call, but there are no tools.", "tool_choice")
        return self


@dataclass(frozen=True)
class Conversation:
    """messages: as OpenAI has them in chat completions, None values left out or not. variables: for the chat template.

    template: the request's own, in place of the model's. reasoning_budget: tokens of reasoning at most. structured: what the content
    must fit; structured_param: the field that says so.
    """

    messages: list[dict[str, Any]]
    tool_use: ToolUse = ToolUse()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    reasoning_budget: int | None = None
    structured: StructuredOutput | None = None
    structured_param: str = "response_format"


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As a `Conversation` has them. RequestError for what does not fit its role."""
    for place, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise RequestError(f"messages[{place}]: only the assistant has tool_calls.", "messages")
        if message.content is None and not message.tool_calls and message.role != "assistant":
            raise RequestError(f"messages[{place}].content is required.", "messages")
    return [msgspec.to_builtins(message) for message in messages]


def tools_of(tools: Sequence[ToolDefinition]) -> list[Tool]:
    """As a `ToolUse` has them."""
    return [
        tool_of(tool.function.name, tool.function.description, tool.function.parameters, tool.function.strict)
        for tool in tools
    ]


def tool_of(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None) -> Tool:
    """A tool with what clients may leave out."""
    return Tool(name, description or "", {"type": "object", "properties": {}, **(parameters or {})}, bool(strict))


def json_output(schema: dict[str, Any], param: str) -> StructuredOutput:
    """What the content must fit if it is to be JSON of this schema; param: the field that says so."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"{param}: the schema is nested too deeply.", param)
    return StructuredOutput("json_schema", msgspec.json.encode(schema).decode())


@contextlib.contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field of chat completions name it as another API does: names has that API's word for each."""
    try:
        yield
    except RequestError as error:
        ours = error.param
        if ours is None or ours not in names:
            raise
        message = error.message.replace(ours, names[ours])
        raise RequestError(message, names[ours], status=error.status, code=error.code) from error


def adds_generation_prompt(body: ChatCompletionRequest | TokenizeRequest) -> bool:
    """As asked for; if nothing is said, unless the last message is to be continued."""
    return not body.continue_final_message if body.add_generation_prompt is UNSET else body.add_generation_prompt


@dataclass(frozen=True)
class ChatPrompt:
    """reading: None = the reply is content and nothing else."""

    token_ids: list[int]
    reading: ReplyReading | None
    structured: StructuredOutput | None


async def prepare(serving: Serving, conversation: Conversation, *, add_special_tokens: bool = False) -> ChatPrompt:
    """What to submit for the conversation. Raises RequestError naming what the model or its template cannot do."""
    template, replies = _template(serving, conversation)
    uses_tools = conversation.tool_use.check().callable_tools
    if uses_tools and not replies.can_call_tools:
        raise RequestError(
            f"tools: how the model {serving.model_id} writes calls is not known; start the server with tool_call_parser=.",
            "tools",
        )
    _check_continuation(conversation)
    text = _render(template, replies, conversation)
    [token_ids] = await serving.encode([text], "messages", add_special_tokens=add_special_tokens)
    continued = text_of(conversation.messages[-1]) if conversation.continue_final_message else None
    begun = replies.begins_in_reasoning(text, continued)
    reading = replies.reading(
        text,
        begins_in_reasoning=begun,
        tools=[_openai_form(tool) for tool in uses_tools],
        tool_names=[tool.name for tool in uses_tools],
    )
    structured = _grammar(serving, replies, conversation, uses_tools, begun)
    if structured is not None:
        param = "tools" if uses_tools else conversation.structured_param
        vocab_size = serving.check_admission().vocab_size
        structured = await serving.grammars.check(structured.kind, structured.source, param, vocab_size)
    return ChatPrompt(token_ids, reading, structured)


def _template(serving: Serving, conversation: Conversation) -> tuple[ChatTemplate, ModelReplies]:
    if conversation.template is None:
        if serving.tokenizer.chat_template is None or serving.replies is None:
            raise RequestError(f"The model {serving.model_id} has no chat template; use /v1/completions.", "messages")
        return serving.tokenizer.chat_template, serving.replies
    if not serving.config.allow_request_chat_template:
        raise RequestError(
            "chat_template: this server takes none from requests (allow_request_chat_template=T lets it).",
            "chat_template",
        )
    if len(conversation.template) > MAX_TEMPLATE_CHARS:
        raise RequestError(f"chat_template is longer than {MAX_TEMPLATE_CHARS} characters.", "chat_template")
    try:
        template = ChatTemplate(conversation.template, serving.tokenizer.special_tokens)
    except ConfigError as error:
        raise RequestError(f"chat_template: {error}", "chat_template") from error
    return template, ModelReplies(serving.tokenizer, template, serving.config.tool_call_parser)


def _check_continuation(conversation: Conversation) -> None:
    if not conversation.continue_final_message:
        return
    if conversation.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
        )
    last = conversation.messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not text_of(last):
        raise RequestError(
            "continue_final_message needs a last message of the assistant with content.", "continue_final_message"
        )


def _render(template: ChatTemplate, replies: ModelReplies, conversation: Conversation) -> str:
    tools = [] if conversation.tool_use.choice == "none" else list(map(_openai_form, conversation.tool_use.tools))
    messages = conversation.messages
    if not replies.takes_tools:
        messages, tools = with_tools_in_text(messages, tools), []
    return template.render(
        messages,
        tools=tools,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        variables={**_effort(template, conversation.reasoning_effort), **conversation.variables},
    )


def _effort(template: ChatTemplate, effort: str | None) -> dict[str, Any]:
    """The effort of reasoning as a variable that the template knows."""
    if effort is None:
        return {}
    if effort == "none" and "enable_thinking" in template.variables:
        return {"enable_thinking": False}
    if "reasoning_effort" in template.variables:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template.variables:
        return {"enable_thinking": True}
    raise RequestError("reasoning_effort: this model's chat template knows of none.", "reasoning_effort")


def _grammar(
    serving: Serving, replies: ModelReplies, conversation: Conversation, tools: Sequence[Tool], begun: bool
) -> StructuredOutput | None:
    """What holds the reply to what is asked; None if anything goes."""
    use, structured, budget = conversation.tool_use, conversation.structured, conversation.reasoning_budget
    if budget is not None and replies.reasoning is None:
        raise RequestError("reasoning_budget: this model is not known to write reasoning.", "reasoning_budget")
    holds_calls = bool(tools) and (
        use.choice == "required" or not use.parallel or structured is not None or any(tool.strict for tool in tools)
    )
    if not holds_calls and structured is None and budget is None:
        return None
    if not tools and replies.reasoning is None:
        return structured
    rules = None
    if tools:
        if replies.style is None:
            raise RequestError("tools: this model's way to write calls cannot be held to a grammar.", "tools")
        choice: Literal["auto", "required"] = "required" if use.choice == "required" else "auto"
        free = {"type": "object"}  # the arguments of tools that need not be called and are not strict
        held = [tool if choice == "required" or tool.strict else replace(tool, parameters=free) for tool in tools]
        rules = CallRules(held, replies.style, choice, use.parallel)
    reasoning = None if replies.reasoning is None else ReasoningRules(replies.reasoning, begun, budget)
    source = reply_grammar(serving.tokenizer.mark_id, calls=rules, reasoning=reasoning, structured=structured)
    return StructuredOutput("lark", source)


def _depth(value: Any) -> int:
    """Levels of lists and objects in a JSON value, found without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


def _openai_form(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
