"""Tokenizers from every source, against transformers and against their own definition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from toka.errors import ConfigError
from toka.gguf_file import GgufFile
from toka.model_source import ModelSource
from toka.text.tokenizer import Tokenizer

TORTURE = [
    "", " ", "  ", "\n", " \n\n \t x", "don't DON'T we'll WE'LL I'm", "1234567890 12 3.14 1,000,000 ½ ² Ⅷ ٣٤",
    "naïve café Ünïcödé", "日本語のテキスト 中文 한국어", "🤗🇩🇪👨‍👩‍👧‍👦 e\u0301", "a\u00a0b\u2003c\u200bd", "<|im_end|> <|im_start|>user\n",
    "\x00\x01\x7f", "  leading", "trailing  ", "tab\tx\r\nCRLF", "x" * 3000, "9" * 500, "\ufffd\ufeff", "!?.,;:-_()[]{}<>@#$%^&*~`|\\/",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm(default_model: ModelSource) -> Tokenizer:
    return Tokenizer.load(default_model.tokenizer_path)


@pytest.fixture(scope="module")
def smollm_definition(default_model: ModelSource) -> Backend:
    """SmolLM2's tokenizer as its authors define it: digits one by one, then GPT-2's byte-level split."""
    metadata = GgufFile.open(default_model.tokenizer_path).metadata
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    backend.add_special_tokens([metadata["tokenizer.ggml.tokens"][i] for i in control])
    return backend


def _gsm8k() -> Iterator[str]:
    directory = os.environ.get("TOKA_TEST_GSM8K")
    for path in sorted(Path(directory).glob("*.jsonl")) if directory else ():
        for line in path.read_text("utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def test_smollm_gguf_equals_its_definition(smollm: Tokenizer, smollm_definition: Backend) -> None:
    for text in [*TORTURE, *_gsm8k()]:
        ids = smollm.encode(text)
        assert ids == smollm_definition.encode(text).ids, text[:50]
        assert smollm.decode(ids, skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_smollm_gguf_equals_its_definition_on_any_text(
    smollm: Tokenizer, smollm_definition: Backend, text: str
) -> None:
    ids = smollm.encode(text)
    assert ids == smollm_definition.encode(text).ids
    # Not always the text again: the vocabulary lacks some bytes (0xF1 for one), which are dropped by its definition.
    assert smollm.decode(ids, skip_special_tokens=False) == smollm_definition.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, 49151), max_size=30))
def test_decoding_any_tokens_equals_the_librarys(smollm: Tokenizer, smollm_definition: Backend, ids: list[int]) -> None:
    assert smollm.decode(ids) == smollm_definition.decode(ids)


def test_smollm_gguf_settings(smollm: Tokenizer) -> None:
    assert smollm.eos_token_ids == (2,)
    assert smollm.bos_token_id == 1
    assert smollm.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm.encode("x", add_special_tokens=True) == smollm.encode("x", add_special_tokens=False)
    assert smollm.token_bytes(2) == b""
    assert smollm.chat_template is not None
    assert smollm.chat_template.render([{"role": "user", "content": "hi"}]).endswith(
        "hi<|im_end|>\n<|im_start|>assistant\n"
    )


def _save_directory(directory: Path, settings: dict | None = None, **files: object) -> Path:
    vocab = {chr(c): c - 97 for c in range(97, 123)} | {"<s>": 26, "</s>": 27, "ab": 28, "Ġ": 29}
    backend = Backend(BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(3)
    backend.save(str(directory / "tokenizer.json"))
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_directory_settings_decide_bos_eos_and_template(tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    }
    tokenizer = Tokenizer.load(_save_directory(tmp_path, settings), [5])
    assert tokenizer.encode("abc") == [26, 28, 2]
    assert tokenizer.encode("abc", add_special_tokens=False) == [28, 2]
    assert tokenizer.eos_token_ids == (5, 27)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == "d"


def test_the_files_truncation_does_not_cut_prompts(tmp_path: Path) -> None:
    assert len(Tokenizer.load(_save_directory(tmp_path)).encode("abcabcabc")) == 6


def test_template_file_comes_before_the_settings(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_save_directory(tmp_path, {"chat_template": "old"}, chat_template__jinja="new"))
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == "new"


def test_special_tokens_map_is_read_too(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_save_directory(tmp_path, None, special_tokens_map__json={"eos_token": "</s>"}))
    assert tokenizer.eos_token_ids == (27,)


def test_tokens_declared_only_in_the_settings_are_added(tmp_path: Path) -> None:
    declared = {"30": {"content": "<tool>", "special": False}, "31": {"content": "<pad>", "special": True}}
    tokenizer = Tokenizer.load(_save_directory(tmp_path, {"added_tokens_decoder": declared}))
    assert tokenizer.encode("a<tool><pad>") == [0, 30, 31]
    assert tokenizer.decode([0, 30, 31]) == "a<tool>"


def test_a_tokenizer_json_path_works_like_its_directory(tmp_path: Path) -> None:
    _save_directory(tmp_path, {"eos_token": "</s>"})
    assert Tokenizer.load(tmp_path / "tokenizer.json").eos_token_ids == (27,)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "neither tokenizer.json nor"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "not a usable tokenizer"),
        (lambda d: (d / "tokenizer_config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_directories_are_config_errors(tmp_path: Path, break_it: Callable, words: str) -> None:
    break_it(_save_directory(tmp_path, {}))
    with pytest.raises(ConfigError, match=words):
        Tokenizer.load(tmp_path)


def test_a_path_without_anything_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Tokenizer.load(tmp_path / "nothing")


def test_an_unknown_decoder_is_a_config_error(tmp_path: Path) -> None:
    backend = Backend(BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.CTC()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="CTC"):
        Tokenizer.load(tmp_path)


def test_the_text_room_does_not_import_torch() -> None:
    code = "import sys, toka.text.tokenizer, toka.text.generated_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
