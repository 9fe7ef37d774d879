"""Turn token ids into text one at a time: constant work per token, never a broken character.

A token stands for bytes; a character may span several tokens, and a token may end inside a character. So tokens become bytes
by table and bytes become text by an incremental UTF-8 decoder, which keeps an unfinished character back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sample as its tokens arrive.

    token_bytes: the bytes that a token id stands for (`Tokenizer.token_bytes`; b"" for a special token that is not shown).
    Bytes that can never become valid UTF-8 turn into U+FFFD. The pieces of text that `push` and `flush` return, joined, are
    the text of all tokens.
    """

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._decoder = _new_utf8_decoder("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)
