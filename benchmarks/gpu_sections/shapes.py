"""The models that are measured: configurations of known models, without their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toka.config import Config
from toka.model_source import ModelSource


@dataclass(frozen=True)
class Shape:
    """hf_config: as config.json has it. Sizes of what is run on it, in tokens or requests:

    max_request_tokens: prompt and output of one request. batches: of decode steps. context: of each row of them, where that fits.
    prefills: tokens of a prompt computed in one step. generate: (batch, prompt tokens, output tokens) of the race with transformers.
    monkeys: (problems, samples of each, tokens that all prompts share, tokens of each question, fewest and most tokens of an answer).
    """

    name: str
    hf_config: dict[str, Any]
    max_request_tokens: int
    batches: tuple[int, ...]
    context: int
    prefills: tuple[int, ...]
    generate: tuple[tuple[int, int, int], ...]
    monkeys: tuple[int, int, int, int, int, int]

    def write(self, directory: Path) -> ModelSource:
        """Write config.json; returns the model that lies there, without weights."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.hf_config))
        return ModelSource("hf_dir", directory, directory, self.name)

    def flags(self, device: str, *, compiled: bool, **others: Any) -> Config:
        """The engine's configuration."""
        limits: dict[str, Any] = {"kv_cache_memory_fraction": 0.85}
        if device == "cpu":
            limits = {
                "kv_cache_num_tokens": 4096,
                "max_seqs_per_forward": max(self.batches),
                "max_tokens_per_forward": max(self.prefills),
            }
        return Config(
            model=self.name,
            device=device,
            max_num_tokens_per_request=self.max_request_tokens,
            torch_compile=compiled,
            **(limits | others),
        ).check()


def _llama(**fields: Any) -> dict[str, Any]:
    rope_factor = fields.pop("rope_factor")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        **fields,
    }


_ON_A_GPU: dict[str, Any] = {
    "max_request_tokens": 9216,
    "batches": (1, 8, 64, 256, 512),
    "context": 512,
    "prefills": (512, 2048, 8192),
    "generate": ((1, 512, 128), (32, 512, 128)),
}

SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        "tiny",
        _llama(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            rope_factor=32.0,
        )
        | {"dtype": "float32"},
        max_request_tokens=96,
        batches=(1, 4),
        context=24,
        prefills=(16, 64),
        generate=((1, 12, 6), (3, 12, 6)),
        monkeys=(2, 4, 24, 8, 4, 8),
    ),
    "1b": Shape(
        "llama-3.2-1b",
        _llama(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
            rope_factor=32.0,
        ),
        monkeys=(32, 128, 640, 64, 64, 256),
        **_ON_A_GPU,
    ),
    "8b": Shape(
        "llama-3.1-8b",
        _llama(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=False,
            rope_factor=8.0,
        ),
        monkeys=(16, 64, 640, 64, 64, 256),
        **_ON_A_GPU,
    ),
}
