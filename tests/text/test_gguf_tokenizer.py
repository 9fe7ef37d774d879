"""Tokenizers built from GGUF metadata: byte-level BPE by named split, SentencePiece BPE by score."""

from __future__ import annotations

from typing import Any

import pytest

from toka.errors import ConfigError
from toka.text.gguf_tokenizer import build_gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def _byte_level(pre: str, extra: list[str] = [], **more: Any) -> dict[str, Any]:  # noqa: B006
    """Metadata of a vocabulary of single characters (space = Ġ), digits, and what is in extra."""
    tokens = [*"abcdefghijklmnopqrstuvwxyzABCD0123456789.,!'Ġ", *extra]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens),
        "tokenizer.ggml.merges": ["a b", "1 2", "12 3", "Ġ a"],
        **more,
    }


def _words(metadata: dict[str, Any], text: str) -> list[str]:
    backend = build_gguf_tokenizer(metadata)
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("default", ["ab", "'", "s", "Ġ", "123", "4", "."]),
        ("gpt-2", ["ab", "'s", "Ġ1234", "."]),
        ("smollm", ["ab", "'s", "Ġ", "1", "2", "3", "4", "."]),
        ("llama-bpe", ["ab", "'s", "Ġ", "123", "4", "."]),
        ("qwen2", ["ab", "'s", "Ġ", "1", "2", "3", "4", "."]),
        ("tekken", ["ab", "'s", "Ġ", "1", "2", "3", "4", "."]),
        ("gpt-4o", ["ab's", "Ġ", "123", "4", "."]),
    ],
)
def test_words_by_named_split(pre: str, words: list[str]) -> None:
    extra = ["ab", "12", "123", "Ġa"]
    assert _words(_byte_level(pre, extra), "ab's 1234.") == words


def test_llama3_takes_whole_words_without_merges() -> None:
    extra = ["ab", "12", "123", "Ġa", "cd"]  # no merge makes cd
    assert build_gguf_tokenizer(_byte_level("llama-bpe", extra)).encode("cd").tokens == ["cd"]
    assert build_gguf_tokenizer(_byte_level("qwen2", extra)).encode("cd").tokens == ["c", "d"]


def test_unknown_split_model_and_missing_vocabulary_are_named() -> None:
    with pytest.raises(ConfigError, match="pre-tokenizer `martian`"):
        build_gguf_tokenizer(_byte_level("martian"))
    with pytest.raises(ConfigError, match="model `rwkv`"):
        build_gguf_tokenizer({**_byte_level("gpt-2"), "tokenizer.ggml.model": "rwkv"})
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        build_gguf_tokenizer({})
    with pytest.raises(ConfigError, match="do not fit"):
        build_gguf_tokenizer({**_byte_level("gpt-2"), "tokenizer.ggml.merges": ["z zz"]})
    with pytest.raises(ConfigError, match="token types"):
        build_gguf_tokenizer({**_byte_level("gpt-2"), "tokenizer.ggml.token_type": [1]})


@pytest.mark.parametrize(("pre", "adds_bos"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_bos_is_added_by_default_where_llama_cpp_does(pre: str, adds_bos: bool) -> None:
    extra = ["ab", "12", "123", "Ġa", "<b>"]
    metadata = _byte_level(pre, extra)
    metadata |= {"tokenizer.ggml.bos_token_id": len(metadata["tokenizer.ggml.tokens"]) - 1}
    assert build_gguf_tokenizer(metadata).encode("c").tokens == (["<b>", "c"] if adds_bos else ["c"])
    metadata["tokenizer.ggml.add_bos_token"] = not adds_bos
    assert build_gguf_tokenizer(metadata).encode("c").tokens == (["c"] if adds_bos else ["<b>", "c"])


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    metadata = _byte_level("gpt-2", ["ab", "12", "123", "Ġa", "<ctl>", "<usr>"])
    metadata["tokenizer.ggml.token_type"][-2:] = [CONTROL, USER_DEFINED]
    backend = build_gguf_tokenizer(metadata)
    ids = backend.encode("a<ctl><usr>").ids
    assert ids[1:] == [len(metadata["tokenizer.ggml.tokens"]) - 2, len(metadata["tokenizer.ggml.tokens"]) - 1]
    assert backend.decode(ids) == "a<usr>"


def _sentencepiece(**more: Any) -> dict[str, Any]:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    by_score = ["▁h", "el", "lo", "ello", "▁hello", "▁", "h", "e", "l", "o", "w"]
    pieces += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(by_score)]
    tokens, scores, kinds = zip(*pieces, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def test_sentencepiece_merges_best_score_first() -> None:
    backend = build_gguf_tokenizer(_sentencepiece())
    assert backend.encode("hello").tokens == ["<s>", "▁hello"]
    assert backend.encode("hello how").tokens == ["<s>", "▁hello", "▁h", "o", "w"]


def test_sentencepiece_falls_back_to_bytes_and_decodes_them() -> None:
    backend = build_gguf_tokenizer(_sentencepiece())
    encoded = backend.encode("hello é")
    assert encoded.tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert backend.decode(encoded.ids) == "hello é"


def test_sentencepiece_without_space_prefix() -> None:
    backend = build_gguf_tokenizer(_sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    assert backend.encode("hello").tokens == ["<s>", "h", "ello"]


def test_sentencepiece_without_scores_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="score"):
        build_gguf_tokenizer(_sentencepiece(**{"tokenizer.ggml.scores": []}))
