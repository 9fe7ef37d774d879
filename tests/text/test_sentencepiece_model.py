"""tokenizer.model files, written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from toka.errors import ConfigError
from toka.text.sentencepiece_model import read_sentencepiece_model
from toka.text.tokenizer import Tokenizer

BPE, UNIGRAM = 2, 1


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return out + bytes((value,))


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _bytes_field(
        1, _bytes_field(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _int_field(3, kind)
    )


def _model(model_type: int = BPE, normalizer: bytes = b"") -> bytes:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]
    pieces += [("▁a", 0.0, 1), ("bc", -1.0, 1), ("▁", -2.0, 1), ("a", -3.0, 1), ("b", -4.0, 1), ("c", -5.0, 1)]
    pad_id = _int_field(43, 2**64 - 1)  # -1: none
    return (
        b"".join(_piece(*piece) for piece in pieces)
        + _bytes_field(2, _int_field(3, model_type) + pad_id)
        + _bytes_field(3, normalizer)
    )


def test_a_directory_with_only_tokenizer_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(_model())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("abc é")
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", "▁a", "bc", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "abc é"
    assert tokenizer.eos_token_ids == (2,)


def test_a_continuation_keeps_its_leading_space(tmp_path: Path) -> None:
    """`decode` is for whole texts; what is generated goes on after a prompt and keeps the space (`token_bytes`)."""
    (tmp_path / "tokenizer.model").write_bytes(_model())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.token_bytes(tokenizer.encode("a")[-1]) == b" a"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no pieces"),
        (_model()[:-1], "not a readable"),
        (b"\xff" * 20, "not a readable"),
        (_model(UNIGRAM), "type BPE"),
        (_model(normalizer=_bytes_field(2, b"rules")), "normalise"),
    ],
)
def test_other_files_are_config_errors(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        read_sentencepiece_model(path)
