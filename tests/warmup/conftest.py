"""Tiny random checkpoints of every family, without transformers and without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from toka.models.registry import build_model
from toka.models.spec import read_spec
from toka.weights.weight import Weight

CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 48},
}


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → a directory with config.json and a safetensors file of small random weights."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = _write(tmp_path_factory.mktemp(family), CONFIG | FAMILIES[family])
        return made[family]

    return make


def _write(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    model = build_model(read_spec(config), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        model.checkpoint_name(name): torch.randn(module.shape, generator=generator) * 0.1
        for name, module in model.named_modules()
        if isinstance(module, Weight)
    }
    save_file(tensors, str(directory / "model.safetensors"))
    return directory
