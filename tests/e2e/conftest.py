"""Real engines and the references they are held against.

The cache directory is that of any toka process ($TOKA_CACHE moves it), so a second run of the tests compiles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from toka import LLM
from toka.config import Config, hub_offline
from toka.model_source import ModelSource, locate

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test_first660.jsonl"
TIE = 1e-3  # two logits of the reference closer than this count as equal


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The embedded default model, fetched if it has to be."""
    return locate("default", None, Config().cache_path(), offline=hub_offline())


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Real prompts: questions of GSM8K, or where the shared data is not beside the checkout, some of our own of like length."""
    if GSM8K.exists():
        return [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    return [
        f"A baker sells {n} loaves every morning and {2 * n + 3} every afternoon for ${n % 5 + 1} each. On Sundays she gives away a "
        f"third of the afternoon's loaves. How much does she earn in {n % 7 + 1} weeks, and how many loaves does she give away?"
        for n in range(3, 663)
    ]


class Reference:
    """Hugging Face transformers in float32 on the same weights."""

    def __init__(self, model: torch.nn.Module):
        self._model = model.eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), V]."""
        return self._model(torch.tensor([token_ids])).logits[0].float()

    def assert_greedy(self, prompt: list[int], generated: list[int], what: str = "") -> None:
        """Each generated token is the likeliest after all before it, or its logit is within TIE of the likeliest's."""
        logits = self.logits(prompt + generated)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(generated)[:, None])[:, 0]
        gap = logits.max(dim=1).values - chosen
        worst = int(gap.argmax())
        assert float(gap[worst]) <= TIE, f"{what}: token {worst} is {gap[worst]:.4f} below the reference's best logit"


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: ModelSource) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(smollm2.path.parent), gguf_file=smollm2.path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return Reference(model)


@pytest.fixture(scope="module")
def smollm2_llm(smollm2: ModelSource) -> Iterator[LLM]:
    """The default model in float32, since it is compared with float32, with a KV cache of moderate size."""
    with LLM(str(smollm2.path), quantize="none", kv_cache_num_tokens=64 * 1024, quiet=True) as llm:
        yield llm
        assert llm.stats().compiles_after_ready_total == 0
        assert llm.stats().num_free_blocks == llm.stats().num_blocks


TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "config": "LlamaConfig",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "num_key_value_heads": 2,
    },
    "mistral": {"config": "MistralConfig", "sliding_window": 24, "num_key_value_heads": 4},
    "qwen2": {"config": "Qwen2Config", "num_key_value_heads": 1},
    "qwen3": {"config": "Qwen3Config", "head_dim": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    """family → a directory with a tiny random checkpoint and tokenizer made by transformers, and the reference for it."""
    made: dict[str, tuple[Path, Reference]] = {}

    def make(family: str) -> tuple[Path, Reference]:
        if family not in made:
            made[family] = _make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def _make_tiny(family: str, directory: Path) -> tuple[Path, Reference]:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = dict(TINY_FAMILIES[family])
    config_class = getattr(transformers, fields.pop("config"))
    config = config_class(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=0,
        attn_implementation="eager",
        **fields,
    )
    torch.manual_seed(sum(family.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # transformers starts biases at 0 and norms at 1, which would hide a missing one
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
        else:
            parameter.data.normal_(0.0, 0.15)
    model.save_pretrained(directory)
    vocabulary = {
        char: place for place, char in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory, Reference(model)
