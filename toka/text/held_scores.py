"""Logprobs of tokens on their way to the client: a token appears only once its text does."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from toka.messages import TokenLogprob


class ScoredToken(NamedTuple):
    """A token as replies tell of it. offset: characters of its text before it. score: None for a prompt's first, which nothing predicts."""

    token_id: int
    offset: int
    score: TokenLogprob | None


class HeldScores:
    """The scored tokens of one sample that may still be cut off by a stop string.

    A token is cut off if its first character is, or stands behind the cut; one without characters (a special token) if it stands behind.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: deque[tuple[ScoredToken, int]] = deque()  # and how much text must be certain for it to appear

    def push(self, token: ScoredToken, *, has_text: bool) -> None:
        self._held.append((token, token.offset + has_text))

    def release(self, num_certain_chars: int | None) -> list[ScoredToken]:
        """Those that appear, in order, now that so many characters are certain; None = all."""
        released = []
        while self._held and (num_certain_chars is None or self._held[0][1] <= num_certain_chars):
            released.append(self._held.popleft()[0])
        return released
