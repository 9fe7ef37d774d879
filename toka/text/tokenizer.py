"""Text to token ids and back, from a Hugging Face directory, a tokenizer.json or a GGUF file (the tokenizers library, no torch).

transformers' AutoTokenizer is not used: it brings torch and ten seconds of imports into the API process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from toka.errors import ConfigError
from toka.gguf_file import GgufFile
from toka.text.chat_template import ChatTemplate
from toka.text.gguf_tokenizer import bos_eos_processor, build_gguf_tokenizer
from toka.text.sentencepiece_model import read_sentencepiece_model

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_ID_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Tokens that end an assistant's turn; a GGUF file that names only the end of a text still means its chat template's one too.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")


class Tokenizer:
    """The tokenizer of one model. Safe to call from several threads.

    special_tokens: name (bos_token, ...) to token. eos_token_ids: every id that ends a text unless ignore_eos.
    chat_template: None if the model has none. response_template: how transformers' ResponseParser reads the model's replies, if the
    tokenizer says so. vocab_size: number of ids, added tokens included (the model's may be larger).
    max_token_bytes: bytes that one token can stand for at most, so text of b bytes is at least b / max_token_bytes tokens.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: dict[str, str],
        extra_eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        response_template: dict[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in self._added.items()}
        self._style = _DecoderStyle(backend)
        self._shown_bytes: dict[int, bytes] = {}
        self._spelled_bytes: dict[int, bytes] = {}
        self.special_tokens = special_tokens
        self.chat_template = ChatTemplate(chat_template, special_tokens) if chat_template is not None else None
        self.response_template = response_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        own_eos = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        self.eos_token_ids = tuple(sorted({*extra_eos_ids, *(() if own_eos is None else (own_eos,))}))

    @classmethod
    def load(cls, path: Path, extra_eos_ids: Sequence[int] = ()) -> Tokenizer:
        """The tokenizer at path: a directory, a tokenizer.json or a GGUF file.

        extra_eos_ids: end tokens that the model's configuration names besides the tokenizer's own. Raises ConfigError if there
        is no tokenizer or it cannot be used.
        """
        if path.is_dir():
            return _load_directory(cls, path, "tokenizer.json", extra_eos_ids)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file or directory to take a tokenizer from")
        if path.suffix == ".json":
            return _load_directory(cls, path.parent, path.name, extra_eos_ids)
        return _load_gguf(cls, path, extra_eos_ids)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def max_token_bytes(self) -> int:
        return _max_token_bytes(self)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. add_special_tokens: put BOS and EOS where the model wants them. Special tokens written out in
        the text become their ids, as in transformers."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_cut(self, text: str, max_tokens: int) -> list[int]:
        """As `encode` with special tokens; the text's own tokens are cut at the end so that max_tokens are left in all."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(max_tokens - self._backend.num_special_tokens_to_add(False), 0))
        ids: list[int] = self._backend.post_process(encoding).ids
        return ids

    def encode_pair(self, first: str, second: str, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """Token ids of two texts, joined as the model wants them, and their types: 1 for the second text's.

        max_tokens: so many are left in all: the longer text is cut at its end until both are equally long, then both; None: cut nothing.
        """
        one, other = (self._backend.encode(text, add_special_tokens=False) for text in (first, second))
        if max_tokens is not None:
            room = max(max_tokens - self._backend.num_special_tokens_to_add(True), 0)
            short, long = sorted((one, other), key=len)
            kept = min(len(short), room // 2)
            short.truncate(kept)
            long.truncate(room - kept)
        joined = self._backend.post_process(one, other)
        return joined.ids, joined.type_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are no valid UTF-8 become U+FFFD."""
        of_token = self.token_bytes if skip_special_tokens else self._bytes_of
        text = b"".join(map(of_token, token_ids)).decode("utf-8", "replace")
        return text[1:] if self._style.strips_first_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text shown to people: none for a special token or an id without a token."""
        shown = self._shown_bytes.get(token_id)
        if shown is None:
            added = self._added.get(token_id)
            shown = b"" if added is not None and added.special else self._bytes_of(token_id)
            self._shown_bytes[token_id] = shown
        return shown

    def token_bytes_with(self, marks: Collection[str]) -> Callable[[int], bytes]:
        """`token_bytes`, but that special tokens which are one of these marks are spelled out."""
        spelled = {self._added_ids[mark]: mark.encode() for mark in marks if mark in self._added_ids}
        if not any(self._added[token_id].special for token_id in spelled):
            return self.token_bytes
        return lambda token_id: spelled.get(token_id) or self.token_bytes(token_id)

    def mark_id(self, mark: str) -> int | None:
        """The id of the added token that is written so; None if there is none."""
        return self._added_ids.get(mark)

    def token_text(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def spelled_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, special tokens spelled out; b"" for an id without a token."""
        spelled = self._spelled_bytes.get(token_id)
        if spelled is None:
            spelled = self._spelled_bytes[token_id] = self._bytes_of(token_id)
        return spelled

    def _bytes_of(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            content: str = added.content
            return content.encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._style.token_bytes(token)

    def to_json(self) -> str:
        """All of it, as a tokenizer.json."""
        serialised: str = self._backend.to_str()
        return serialised

    def info(self) -> dict[str, Any]:
        """What clients that tokenize by themselves want to know (GET /tokenizer_info)."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": self.vocab_size,
            "chat_template": None if self.chat_template is None else self.chat_template.source,
            **{name: self.special_tokens.get(name) for name in SPECIAL_TOKEN_NAMES},
        }


@cache
def _max_token_bytes(tokenizer: Tokenizer) -> int:
    return max(len(token.encode()) for token in tokenizer._backend.get_vocab(with_added_tokens=True))


class _DecoderStyle:
    """How the backend's decoder turns a token into bytes; told from its declared steps."""

    def __init__(self, backend: Backend):
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._continuing = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)
        if not self._byte_level and self._continuing is None and not kinds & {"ByteFallback", "Metaspace", "Replace"}:
            raise ConfigError(f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported")
        self.strips_first_space = self._continuing is not None or any(
            (step["type"] == "Strip" and step["content"] == " " and step["start"] == 1)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )

    def token_bytes(self, token: str) -> bytes:
        if self._byte_level:
            table = _byte_of_char()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
            return token.encode()
        if self._continuing is not None:  # a word piece: it goes on from the one before, or begins a word
            is_first = not token.startswith(self._continuing)
            return (" " + token if is_first else token.removeprefix(self._continuing)).encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes((int(token[3:5], 16),))
        return token.replace("▁", " ").encode()


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    declared: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return declared["decoders"] if declared["type"] == "Sequence" else [declared]


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


# ------------------------------------------------------------------------------------------------- Hugging Face directory


def _load_directory(cls: type[Tokenizer], directory: Path, file_name: str, extra_eos_ids: Sequence[int]) -> Tokenizer:
    settings = _read_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **settings})
    backend = _read_backend(directory, file_name)
    _add_declared_tokens(backend, settings, special_tokens)
    if "add_bos_token" in settings or "add_eos_token" in settings:
        backend.post_processor = bos_eos_processor(
            _marked(backend, special_tokens.get("bos_token") if settings.get("add_bos_token") else None),
            _marked(backend, special_tokens.get("eos_token") if settings.get("add_eos_token") else None),
        )
    return cls(
        backend,
        special_tokens=special_tokens,
        extra_eos_ids=extra_eos_ids,
        chat_template=_chat_template_source(directory, settings),
        response_template=settings.get("response_template"),
    )


def _read_backend(directory: Path, file_name: str) -> Backend:
    path = directory / file_name
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{path}: not a usable tokenizer ({str(error)[:200]})") from error
    if (directory / "tokenizer.model").is_file():
        return build_gguf_tokenizer(read_sentencepiece_model(directory / "tokenizer.model"))
    raise ConfigError(f"{directory}: holds neither tokenizer.json nor tokenizer.model; give tokenizer=PATH")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the file; {} if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _add_declared_tokens(backend: Backend, settings: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json declares, and special marks for those that are named special."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = sorted((int(token_id), spec) for token_id, spec in settings.get("added_tokens_decoder", {}).items())
    for _, spec in declared:
        if spec["content"] not in known:
            flags = {key: spec[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in spec}
            token = AddedToken(spec["content"], special=spec.get("special", False), **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            known.add(spec["content"])
    named = [token for token in special_tokens.values() if token not in known]
    backend.add_special_tokens([token for token in named if backend.token_to_id(token) is not None])


def _marked(backend: Backend, token: str | None) -> tuple[str, int] | None:
    token_id = None if token is None else backend.token_to_id(token)
    return None if token is None or token_id is None else (token, token_id)


def _chat_template_source(directory: Path, settings: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    source = settings.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several named templates
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default")
    return source if isinstance(source, str) else None


# -------------------------------------------------------------------------------------------------------------- GGUF file


def _load_gguf(cls: type[Tokenizer], path: Path, extra_eos_ids: Sequence[int]) -> Tokenizer:
    metadata = GgufFile.open(path).metadata
    backend = build_gguf_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    special_tokens = {
        name: tokens[metadata[key]]
        for name, key in _GGUF_ID_KEYS.items()
        if key in metadata and 0 <= metadata[key] < len(tokens)
    }
    template = metadata.get("tokenizer.chat_template")
    declared = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom"))
    eos_ids = {*extra_eos_ids, *(token_id for token_id in declared if token_id is not None)}
    in_template = (backend.token_to_id(token) for token in _TURN_ENDS if token in (template or ""))
    eos_ids.update(token_id for token_id in in_template if token_id is not None)
    return cls(backend, special_tokens=special_tokens, extra_eos_ids=sorted(eos_ids), chat_template=template)
