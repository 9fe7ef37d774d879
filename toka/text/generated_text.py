"""The text of one sample as its tokens come in: detokenised, cut at stop strings, closed with a reason."""

from __future__ import annotations

from collections.abc import Callable

from toka.messages import FinishReason
from toka.params import SamplingParams
from toka.text.detokenizer import Detokenizer
from toka.text.stop import StopMatcher

_REASON_WORDS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.EXPIRED: "error",
}


class GeneratedText:
    """Feed it a sample's tokens; it says what text is certain and when the sample is over.

    token_bytes: see `Detokenizer`. num_tokens: tokens taken so far. finish_reason: "stop", "length", "abort", "error", or None.
    num_decoded_chars: of the tokens taken so far, a stop string included; num_certain_chars: returned so far.
    """

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_min_tokens",
        "finish_reason",
        "num_certain_chars",
        "num_decoded_chars",
        "num_tokens",
    )

    def __init__(self, token_bytes: Callable[[int], bytes], sampling: SamplingParams):
        self._detokenizer = Detokenizer(token_bytes)
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self.num_tokens = self.num_decoded_chars = self.num_certain_chars = 0
        self.finish_reason: str | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return None if self._matcher is None else self._matcher.found or None

    @property
    def may_be_cut(self) -> bool:
        """Whether text that is decoded may yet not appear, or does not: there are stop strings, and the end has not come without one."""
        return self._matcher is not None and (self._matcher.stopped or self.finish_reason is None)

    def take(self, token_id: int, finish: int) -> str:
        """One token (-1 = none) and why it is the last (FinishReason); returns the text that is now certain, maybe "".

        The token that ends a sample by STOP is counted but is no part of the text. Sets `finish_reason` when the sample is over, which
        a stop string can bring about while the engine still generates.
        """
        text = ""
        if token_id >= 0:
            self.num_tokens += 1
            if finish != FinishReason.STOP:
                text = self._detokenizer.push(token_id)
        if finish:
            self.finish_reason = _REASON_WORDS[FinishReason(finish)]
            text += self._detokenizer.flush()
        self.num_decoded_chars += len(text)
        certain = self._certain(text, finish)
        self.num_certain_chars += len(certain)
        return certain

    def _certain(self, text: str, finish: int) -> str:
        """What no stop string can take back, after this much more text."""
        if self._matcher is None:
            return text
        text = self._matcher.push(text, may_stop=self.num_tokens >= self._min_tokens)
        if self._matcher.stopped:
            self.finish_reason = "stop"
        elif finish:
            text += self._matcher.flush()
        return text
