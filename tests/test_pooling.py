"""How flags, config.json and sentence-transformers' files settle what is done with prompts; what is made of vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toka.config import Config
from toka.errors import ConfigError, RequestError
from toka.pooling import Pooling, cosine, read_pooling, tokens_kept

BERT = {"model_type": "bert", "architectures": ["BertModel"]}
CROSS = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}
QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def sentence_transformers(directory: Path, pooling: dict[str, Any], *more: str, **settings: Any) -> Path:
    """The files beside a checkpoint, in the names of its earlier releases."""
    kinds = ["Transformer", "Pooling", *more]
    paths = {"Pooling": "1_Pooling", "Transformer": ""}
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if settings:
        (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    return directory


def test_a_decoder_generates_unless_told_otherwise() -> None:
    assert read_pooling(Config(), QWEN, None) is None
    pooling = read_pooling(Config(task="embed"), QWEN, None)
    assert pooling == Pooling(task="embed", mode="last", normalize=True, is_encoder=False)
    assert read_pooling(Config(task="embed", pooling="mean"), QWEN, None).mode == "mean"


def test_a_decoder_with_modules_embeds(tmp_path: Path) -> None:
    directory = sentence_transformers(tmp_path, {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False})
    pooling = read_pooling(Config(), QWEN, directory)
    assert pooling == Pooling(task="embed", mode="last", normalize=False, is_encoder=False)
    assert read_pooling(Config(task="generate"), QWEN, directory) is None


def test_an_encoder_embeds_or_scores() -> None:
    assert read_pooling(Config(), BERT, None) == Pooling(task="embed", mode="mean", normalize=True, is_encoder=True)
    scores = read_pooling(Config(), CROSS, None)
    assert scores == Pooling(task="score", mode="cls", normalize=False, is_encoder=True, applies_sigmoid=True)
    assert read_pooling(Config(task="embed", pooling="cls"), CROSS, None).task == "embed"


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_files_beside_the_checkpoint_decide(tmp_path: Path, settings: dict[str, Any], mode: str) -> None:
    directory = sentence_transformers(tmp_path, settings, "Normalize", max_seq_length=128)
    pooling = read_pooling(Config(), BERT, directory)
    assert (pooling.mode, pooling.normalize, pooling.max_prompt_tokens) == (mode, True, 128)
    assert read_pooling(Config(pooling="last"), BERT, directory).mode == "last"


@pytest.mark.parametrize(
    ("hf_config", "applies"),
    [
        ({}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
    ],
)
def test_a_head_may_say_what_follows_it(hf_config: dict[str, Any], applies: bool) -> None:
    assert read_pooling(Config(), CROSS | hf_config, None).applies_sigmoid is applies


@pytest.mark.parametrize(
    ("flags", "hf_config", "words"),
    [
        ({"task": "generate"}, BERT, "task=generate: an encoder"),
        ({"task": "score"}, BERT, "task=score: the checkpoint has no classification head"),
        ({"task": "score"}, QWEN, "task=score: the checkpoint has no classification head"),
        ({"pooling": "mean"}, QWEN, "pooling=mean: needs task=embed"),
        ({"pooling": "mean"}, CROSS, "pooling=mean: a classification head reads the first token"),
        ({"task": "embed", "pooling": "cls"}, QWEN, "pooling=cls: a decoder's first token"),
        ({}, CROSS | {"sbert_ce_default_activation_function": "torch.nn.Tanh"}, "activation 'torch.nn.Tanh'"),
    ],
)
def test_what_does_not_fit_together_is_refused(flags: dict[str, str], hf_config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_pooling(Config(**flags), hf_config, None)


@pytest.mark.parametrize(
    ("pooling", "more", "words"),
    [
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "the module Dense is not supported"),
        ({"pooling_mode_max_tokens": True}, [], "pooling mode pooling_mode_max_tokens is not supported"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [], "cls_token is not supported"),
        ({"pooling_mode": "weightedmean"}, [], "pooling mode weightedmean is not supported"),
        ({}, [], "pooling mode none is not supported"),
    ],
)
def test_modules_that_toka_lacks_are_refused(
    tmp_path: Path, pooling: dict[str, Any], more: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_pooling(Config(), BERT, sentence_transformers(tmp_path, pooling, *more))


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    directory = sentence_transformers(tmp_path, {}, "Dense")
    assert read_pooling(Config(task="generate"), QWEN, directory) is None
    assert read_pooling(Config(), CROSS, directory).task == "score"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    directory = sentence_transformers(tmp_path, {"pooling_mode": "mean"}, max_seq_length="long")
    with pytest.raises(ConfigError, match=r"sentence_bert_config.json: max_seq_length must be"):
        read_pooling(Config(), BERT, directory)
    (directory / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match=r"modules.json cannot be read as JSON"):
        read_pooling(Config(), BERT, directory)


def test_a_vector_is_cut_then_normalised() -> None:
    pooling = Pooling(task="embed", mode="mean", normalize=True, is_encoder=True, width=4)
    vector = np.array([3.0, 4.0, 12.0, 0.0], dtype=np.float32)
    np.testing.assert_allclose(pooling.finish(vector), vector / 13)
    np.testing.assert_allclose(pooling.finish(vector, 2), [0.6, 0.8])
    np.testing.assert_array_equal(pooling.finish(vector, 2, normalize=False), [3.0, 4.0])
    assert not pooling.finish(np.zeros(4, dtype=np.float32)).any()
    for dimensions in (0, 5):
        with pytest.raises(RequestError, match="between 1 and 4"):
            pooling.check_dimensions(dimensions)


def test_scores() -> None:
    plain = Pooling(task="score", mode="cls", normalize=False, is_encoder=True, width=1)
    vector = np.array([-2.0], dtype=np.float32)
    assert plain.score(vector) == -2.0
    sigmoid = Pooling(task="score", mode="cls", normalize=False, is_encoder=True, width=1, applies_sigmoid=True)
    assert sigmoid.score(vector) == pytest.approx(0.1192029)
    assert sigmoid.score(np.array([-800.0], dtype=np.float32)) == 0.0


def test_what_prompts_are_cut_to() -> None:
    assert [tokens_kept(wanted, 8) for wanted in (None, -1, 1, 8)] == [None, 8, 1, 8]
    for wanted in (0, -2, 9):
        with pytest.raises(RequestError, match=f"-1 or between 1 and 8, got {wanted}"):
            tokens_kept(wanted, 8)


def test_cosine() -> None:
    one = np.array([1.0, 0.0], dtype=np.float32)
    assert cosine(one, np.array([3.0, 3.0], dtype=np.float32)) == pytest.approx(2**-0.5)
    assert cosine(one, np.zeros(2, dtype=np.float32)) == 0.0


def test_a_pairs_second_text_is_told_by_its_ids() -> None:
    pooling = Pooling(task="score", mode="cls", normalize=False, is_encoder=True, num_token_types=2, vocab_size=100)
    assert pooling.pair_ids([1, 2, 3], [0, 0, 1]) == [1, 2, 103]
    one_type = Pooling(task="score", mode="cls", normalize=False, is_encoder=True, vocab_size=100)
    assert one_type.pair_ids([1, 2, 3], [0, 0, 1]) == [1, 2, 3]
