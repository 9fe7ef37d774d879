"""Tokens to text one at a time, against decoding everything at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toka.text.detokenizer import Detokenizer


def _one_byte(token_id: int) -> bytes:
    return bytes((token_id,))


@given(st.binary(max_size=60))
def test_pieces_joined_are_the_whole_text_even_of_invalid_bytes(data: bytes) -> None:
    detokenizer = Detokenizer(_one_byte)
    text = "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush()
    assert text == data.decode("utf-8", "replace")


@given(st.text(max_size=30), st.lists(st.integers(1, 7), min_size=1))
def test_every_piece_is_whole_characters_whatever_bytes_a_token_holds(text: str, sizes: list[int]) -> None:
    data = text.encode()
    tokens, at = [], 0
    while at < len(data):
        size = sizes[len(tokens) % len(sizes)]
        tokens.append(data[at : at + size])
        at += size
    detokenizer = Detokenizer(tokens.__getitem__)
    pieces = [detokenizer.push(i) for i in range(len(tokens))]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces).replace(text, "")
    assert detokenizer.flush() == ""


def test_an_unfinished_character_waits_and_then_shows_as_a_replacement() -> None:
    detokenizer = Detokenizer(_one_byte)
    assert [detokenizer.push(byte) for byte in "é".encode()[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_a_character_over_four_tokens_comes_with_the_last() -> None:
    detokenizer = Detokenizer(_one_byte)
    assert [detokenizer.push(byte) for byte in "🤗".encode()] == ["", "", "", "🤗"]
