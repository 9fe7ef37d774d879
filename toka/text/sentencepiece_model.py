"""Read a SentencePiece `tokenizer.model` far enough to rebuild its tokenizer, without the sentencepiece package.

The file is one protobuf message (sentencepiece_model.proto, ModelProto): field 1 repeats the pieces (1 = text, 2 = score,
3 = type, numbered as GGUF numbers its token types), field 2 holds the trainer's settings (3 = model type, 40..43 = ids of
unk, bos, eos, pad), field 3 the normalizer's (1 = name, 2 = rules, 3 = add_dummy_prefix).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toka.errors import ConfigError

_BPE = 2
_NORMAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_sentencepiece_model(path: Path) -> dict[str, Any]:
    """The file's content in the words of GGUF metadata (`tokenizer.ggml.*`), as `build_gguf_tokenizer` takes them.

    Raises ConfigError if the file is damaged, or of a kind that tokenizer.json is needed for (unigram, text normalisation).
    """
    try:
        return _to_metadata(path.read_bytes())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; convert it to tokenizer.json and give tokenizer=PATH") from error
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ConfigError(f"{path}: not a readable SentencePiece model ({error})") from error


def _to_metadata(data: bytes) -> dict[str, Any]:
    tokens, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode())
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, _NORMAL))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("it holds no pieces")
    if trainer.get(3, 1) != _BPE:
        raise ConfigError("only SentencePiece models of type BPE are read")
    if normalizer.get(2):
        raise ConfigError("SentencePiece models that normalise text are not read")
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.unknown_token_id": trainer.get(40, 0),
        "tokenizer.ggml.bos_token_id": trainer.get(41, 1),
        "tokenizer.ggml.eos_token_id": trainer.get(42, 2),
    }
    return {key: value for key, value in metadata.items() if not (key.endswith("_id") and value >= len(tokens))}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: ints for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} is unknown")
        if at + size > len(data):
            raise ValueError("a field runs past the end of the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")
