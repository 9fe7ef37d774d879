"""Texts cut to a length, pairs of texts, word pieces: as the tokenizers library itself has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from toka.text.tokenizer import Tokenizer

WORDS = ["the", "cat", "sat", "on", "##s", "##ting", "mat", ",", "a"]
FIRST, SECOND = "the cat sat on the mat", "a cat , a mat , the cat sat"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {token: place for place, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    backend.enable_truncation(4)  # as a checkpoint may carry it: not ours
    backend.enable_padding(length=9)
    path = tmp_path_factory.mktemp("words")
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def backend_cut_to(directory: Path, max_tokens: int) -> Backend:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.no_padding()
    backend.enable_truncation(max_tokens)
    return backend


@pytest.mark.parametrize("max_tokens", range(3, 10))
def test_a_text_is_cut_at_its_end_and_keeps_its_special_tokens(
    tokenizer: Tokenizer, directory: Path, max_tokens: int
) -> None:
    assert tokenizer.encode_cut(FIRST, max_tokens) == backend_cut_to(directory, max_tokens).encode(FIRST).ids


@pytest.mark.parametrize("texts", [(FIRST, SECOND), (SECOND, FIRST), (FIRST, FIRST), ("a", SECOND), (SECOND, "a")])
@pytest.mark.parametrize("max_tokens", [*range(5, 20), None])
def test_pairs_are_joined_and_cut_as_the_library_does(
    tokenizer: Tokenizer, directory: Path, texts: tuple[str, str], max_tokens: int | None
) -> None:
    expected = backend_cut_to(directory, max_tokens or 1000).encode(*texts)
    assert tokenizer.encode_pair(*texts, max_tokens) == (expected.ids, expected.type_ids)


def test_word_pieces_are_put_together(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cats sat on a mat")
    assert tokenizer.decode(ids) == "the cats sat on a mat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[CLS] the cats sat on a mat[SEP]"
