"""Reasoning text: between which marks a model writes it, and how it is read off a reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toka.text.reply_parts import PartWriter
from toka.text.text_feed import Reading, TextFeed


@dataclass(frozen=True)
class ReasoningMarks:
    """What stands before and behind a model's reasoning."""

    begin: str
    end: str


_KNOWN = (
    ReasoningMarks("<think>", "</think>"),
    ReasoningMarks("[THINK]", "[/THINK]"),
    ReasoningMarks("<seed:think>", "</seed:think>"),
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningMarks("<|inner_prefix|>", "<|inner_suffix|>"),
)


def marks_of_template(source: str) -> ReasoningMarks | None:
    """The marks that a chat template uses; None if it knows of no reasoning."""
    return next((marks for marks in _KNOWN if marks.end in source), None)


def prompt_begins_reasoning(prompt: str, marks: ReasoningMarks) -> bool:
    """Whether the reply to the prompt begins in the middle of reasoning, since the prompt ends with the mark that begins it."""
    return prompt.rstrip().endswith(marks.begin)


def read_reasoning(
    feed: TextFeed, parts: PartWriter, marks: ReasoningMarks, *, begun: bool, mark_seen: Callable[[bool], None]
) -> Reading[None]:
    """The reasoning at the beginning of a reply, if there is any.

    begun: whether the prompt says the first mark already (the model may repeat it). mark_seen: called at the first mark with True, at
    the last one with False.
    """
    space = yield from feed.take_space()
    if not (yield from feed.take_mark(marks.begin)) and not begun:
        parts.content(space)
        return
    mark_seen(True)
    while True:
        text, mark = yield from feed.take_until((marks.end,))
        parts.reasoning(text)
        if mark:
            mark_seen(False)
            parts.end_reasoning()
            return
        if not text:
            return
