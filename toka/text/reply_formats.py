"""How one model's replies are written: told from its tokenizer and its chat template, or by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from toka.text.chat_template import ChatTemplate
from toka.text.reasoning import ReasoningMarks, marks_of_template, prompt_begins_reasoning
from toka.text.reply_parser import PartParser, ReplyFormat, ReplyParser
from toka.text.reply_reader import ReplyReading
from toka.text.response_template import ResponseTemplate
from toka.text.tokenizer import Tokenizer
from toka.text.tool_calls import STYLES, CallStyle, style_called, style_of_template


class ModelReplies:
    """What the replies to prompts of one chat template look like.

    style: how tool calls are written, for grammars; None = in no style that toka knows. takes_tools: whether the template shows tools to
    the model; if not, `with_tools_in_text` does. reasoning: None = the model writes none. Raises ConfigError for a response_template that
    cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, tool_call_parser: str):
        self._tokenizer = tokenizer
        self.takes_tools = "tools" in template.variables
        self.style = _style(template.source, self.takes_tools, tool_call_parser)
        self.reasoning: ReasoningMarks | None = marks_of_template(template.source)
        by_template = tool_call_parser == "auto" and tokenizer.response_template is not None
        self._response_template = (
            ResponseTemplate(tokenizer.response_template)
            if by_template and tokenizer.response_template is not None
            else None
        )

    @property
    def can_call_tools(self) -> bool:
        """Whether calls of tools can be read off the replies."""
        return self.style is not None or self._response_template is not None

    def begins_in_reasoning(self, prompt: str, continued: str | None) -> bool:
        """Whether the reply to the prompt begins in the middle of reasoning. continued: the content of the last message, if the reply goes
        on in it."""
        if self.reasoning is None:
            return False
        if continued is not None:
            return continued.rfind(self.reasoning.begin) > continued.rfind(self.reasoning.end)
        return prompt_begins_reasoning(prompt, self.reasoning)

    def reading(
        self, prompt: str, *, begins_in_reasoning: bool, tools: Sequence[Mapping[str, Any]], tool_names: Collection[str]
    ) -> ReplyReading | None:
        """How to read replies to the prompt; None if they are content and nothing else. tools: as in OpenAI's API; those that may be
        called have tool_names, none if no call is to be looked for."""
        if self._response_template is not None:
            template, known = self._response_template, [dict(tool) for tool in tools]
            return ReplyReading(lambda: template.parser(prompt, known), self._tokenizer.spelled_bytes)
        format = ReplyFormat(self.reasoning, begins_in_reasoning, self.style if tool_names else None, tool_names)
        if format.is_plain:
            return None
        new_parser: Callable[[], PartParser] = lambda: ReplyParser(format)  # noqa: E731 (typed as the protocol)
        return ReplyReading(new_parser, self._tokenizer.token_bytes_with(format.marks))


def _style(source: str, takes_tools: bool, tool_call_parser: str) -> CallStyle | None:
    if tool_call_parser != "auto":
        return style_called(tool_call_parser, source)
    return style_of_template(source) if takes_tools else STYLES["hermes"]
