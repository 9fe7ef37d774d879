"""Hidden states and classification heads of encoders equal those of transformers, rows of different lengths in one flat batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from toka.errors import ConfigError
from toka.models.encoder import Encoder
from toka.models.encoder_spec import read_encoder_spec
from toka.models.registry import build_encoder
from toka.weights.loader import load_weights, open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
CLASSES = {
    "bert": ("BertConfig", "BertModel", {}),
    "bert-gelu-new": ("BertConfig", "BertModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "bert-masked-lm": ("BertConfig", "BertForMaskedLM", {}),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", {"num_labels": 1}),
    "roberta": ("RobertaConfig", "RobertaModel", {"type_vocab_size": 1}),
    "roberta-classifier": ("RobertaConfig", "RobertaForSequenceClassification", {"num_labels": 1}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", {"type_vocab_size": 1}),
}
LENS = [7, 1, 36, 12]


def saved(kind: str, directory: Path, randomise: Callable[[torch.nn.Module], None]) -> Any:
    config_class, model_class, more = CLASSES[kind]
    config = getattr(transformers, config_class)(**SIZES | more)
    reference = getattr(transformers, model_class)(config).eval()
    randomise(reference)
    reference.save_pretrained(directory)
    return reference


def loaded(directory: Path, *, with_classifier: bool) -> Encoder:
    config = json.loads((directory / "config.json").read_text())
    model = build_encoder(read_encoder_spec(config, with_classifier=with_classifier), torch.float32)
    load_weights(model, open_checkpoint(directory))
    return model


def prompts(types: int) -> list[tuple[Tensor, Tensor]]:
    """(token ids, token types) of each row; the second half of a row is of another type where there are two. No padding token."""
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, SIZES["vocab_size"], (length,), generator=random) for length in LENS]
    return [(each, (torch.arange(len(each)) >= len(each) // 2).long() * (types - 1)) for each in ids]


def flat_step(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The rows as a step has them, with two tokens of padding."""
    ids = [row + SIZES["vocab_size"] * types for row, types in rows]
    positions = [torch.arange(len(row)) for row in ids]
    starts = [0, *accumulate(map(len, ids)), sum(map(len, ids))]
    pad = torch.zeros(2, dtype=torch.int64)
    return (
        torch.cat([*ids, pad]).int(),
        torch.cat([*positions, pad]).int(),
        torch.tensor(starts, dtype=torch.int32),
    )


@pytest.mark.parametrize("kind", CLASSES)
@torch.inference_mode()
def test_same_as_transformers(kind: str, tmp_path: Path, randomise: Callable[[torch.nn.Module], None]) -> None:
    reference = saved(kind, tmp_path, randomise)
    classifies = kind.endswith("classifier")
    model = loaded(tmp_path, with_classifier=classifies)
    rows = prompts(model.spec.num_token_types)
    hidden = model(*flat_step(rows))
    base = getattr(reference, reference.base_model_prefix, reference)
    for (ids, types), ours in zip(rows, hidden[: sum(LENS)].split(LENS), strict=True):
        whole = {"input_ids": ids[None], "token_type_ids": types[None]}
        torch.testing.assert_close(ours, base(**whole).last_hidden_state[0], atol=2e-5, rtol=1e-4)
        if classifies:
            assert model.head is not None
            torch.testing.assert_close(model.head(ours[:1]), reference(**whole).logits, atol=2e-5, rtol=1e-4)


def test_a_classifier_may_be_left_out(tmp_path: Path, randomise: Callable[[torch.nn.Module], None]) -> None:
    saved("bert-classifier", tmp_path, randomise)
    assert loaded(tmp_path, with_classifier=False).head is None


def test_a_tensor_that_nothing_explains_is_an_error(
    tmp_path: Path, randomise: Callable[[torch.nn.Module], None]
) -> None:
    saved("bert", tmp_path, randomise)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "encoder.layer.3.output.dense.bias": torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'encoder.layer.3.output.dense.bias' is in .* not known"):
        loaded(tmp_path, with_classifier=False)
    del tensors["embeddings.LayerNorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'embeddings.LayerNorm.bias' is missing"):
        loaded(tmp_path, with_classifier=False)


def test_the_context_is_what_the_position_table_holds() -> None:
    config = {**SIZES, "model_type": "bert"}
    assert read_encoder_spec(config, with_classifier=False).max_context_tokens == 40
    config["model_type"] = "roberta"  # counts from behind the padding token
    assert read_encoder_spec(config, with_classifier=False).max_context_tokens == 38


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "electra"}, "model_type is no supported encoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be one of absolute"),
        ({"is_decoder": True}, "is_decoder must be false"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size=48"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"quantization_config": {}}, "quantization_config is not supported"),
        ({"model_type": "roberta", "pad_token_id": -1}, "pad_token_id must be a whole number, 0 or more"),
        ({"model_type": "roberta", "pad_token_id": 39}, "max_position_embeddings must be above 40"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_encoder_spec({**SIZES, "model_type": "bert", **change}, with_classifier=False)


def test_the_labels_are_counted() -> None:
    config = {**SIZES, "model_type": "bert"}
    for more, count in (({}, 2), ({"num_labels": 1}, 1), ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3)):
        assert read_encoder_spec(config | more, with_classifier=True).num_labels == count
        assert read_encoder_spec(config | more, with_classifier=False).num_labels == 0
