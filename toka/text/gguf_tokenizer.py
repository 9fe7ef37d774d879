"""Build a `tokenizers.Tokenizer` from the `tokenizer.ggml.*` metadata of a GGUF file.

Two vocabularies are known: `gpt2` (byte-level BPE with merges; how text is split first is named by tokenizer.ggml.pre) and
`llama` (SentencePiece BPE: merges follow from the scores, unknown characters fall back to bytes). The split expressions are
those that llama.cpp lists per name (src/llama-vocab.cpp); each is applied to the pieces that the one before left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from toka.errors import ConfigError

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"), (_GPT2,)
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"), (_QWEN2,)
    ),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), (_GPT4O,)),
    "deepseek-coder": _DEEPSEEK_CODER,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "falcon": _FALCON,
}
_LLAMA3_GROUP = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_WHOLE_WORDS_FIRST = frozenset((*_LLAMA3_GROUP, "tekken"))  # a word that is a token is taken whole, without merges
_BOS_BY_DEFAULT = frozenset((*_LLAMA3_GROUP, "tekken"))  # where add_bos_token is not given


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata describe, special tokens and the adding of BOS and EOS included.

    Raises ConfigError for a vocabulary or a split that is unknown, or for metadata that contradict themselves.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not kind or not tokens:
        raise ConfigError("the GGUF file holds no tokenizer; give one with tokenizer=PATH")
    types = _numbers(metadata, "tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ConfigError(f"the GGUF tokenizer has {len(tokens)} tokens but {len(types)} token types")
    if kind == "gpt2":
        backend = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece_bpe(metadata, tokens, types)
    else:
        raise ConfigError(f"GGUF tokenizer model `{kind}` is not supported (gpt2 and llama are); give tokenizer=PATH")
    _add_marked_tokens(backend, tokens, types)
    backend.post_processor = _bos_eos_processor(metadata, tokens)
    return backend


def _numbers(metadata: Mapping[str, Any], key: str) -> list[Any]:
    """The array under key, which may be a list or a numpy array, as a list; [] if there is none."""
    numbers: list[Any] = np.asarray(metadata.get(key, ())).tolist()
    return numbers


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise ConfigError(f"GGUF pre-tokenizer `{pre}` is not supported; give the original one with tokenizer=PATH")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ConfigError("the GGUF tokenizer's merges are missing or malformed")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        model = BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST, fuse_unk=False)
    except (
        Exception
    ) as error:  # tokenizers raises bare Exception, e.g. for a merge whose token is not in the vocabulary
        raise ConfigError(f"the GGUF tokenizer's vocabulary and merges do not fit: {error}") from error
    backend = Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _numbers(metadata, "tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise ConfigError("the GGUF tokenizer has no score for every token")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown_id is None and _UNKNOWN in types:
        unknown_id = types.index(_UNKNOWN)
    model = BPE(
        vocab=vocab,
        merges=_merges_by_score(tokens, types, scores, vocab),
        unk_token=None if unknown_id is None else tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    to_underline = normalizers.Replace(" ", "▁")
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_underline])
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        backend.normalizer, strip = to_underline, []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to make a normal token of two others, best result first: SentencePiece merges the pair whose result scores
    best, and of equals the leftmost, which is how a list of merges is read too."""
    merges = []
    for token_id, token in enumerate(tokens):
        if types[token_id] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None and types[left] == types[right] == _NORMAL:
                merges.append((-scores[token_id], left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, left, right in merges]


def _add_marked_tokens(backend: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens of type control (special: not shown to people) and user-defined (text) are found before anything is split."""
    marked = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens([token for token in marked if not token.special])
    backend.add_special_tokens([token for token in marked if token.special])


def _bos_eos_processor(metadata: Mapping[str, Any], tokens: list[str]) -> processors.TemplateProcessing:
    is_spm = metadata["tokenizer.ggml.model"] == "llama"
    bos_by_default = is_spm or metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    bos_id = metadata.get("tokenizer.ggml.bos_token_id") if add_bos else None
    eos_id = metadata.get("tokenizer.ggml.eos_token_id") if add_eos else None
    return bos_eos_processor(
        None if bos_id is None else (tokens[bos_id], bos_id), None if eos_id is None else (tokens[eos_id], eos_id)
    )


def bos_eos_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """A post-processor that puts bos before and eos after a text; each is (token, id), None = not added."""
    before = [f"{bos[0]}:0"] if bos else []
    after = [f"{eos[0]}:0"] if eos else []
    return processors.TemplateProcessing(
        single=[*before, "$A:0", *after], special_tokens=[marked for marked in dict.fromkeys((bos, eos)) if marked]
    )
