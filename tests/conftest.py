"""Fixtures that several rooms share: built kernels, the default model, and checkpoints made to measure.

`pytest -m gpu` also runs on a machine with a GPU where nothing can be installed (see benchmarks/bare_checkout.py): toka is then imported
from this checkout, and only files with tests for a GPU are collected, since others may import what is missing there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import gguf

    from toka.model_source import ModelSource

HERE = Path(__file__).parent


def _bare_checkout() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bare_checkout", HERE.parent / "benchmarks" / "bare_checkout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _not_for_a_gpu() -> list[str]:
    """Test files without a test for a GPU, and directories without such a file."""
    wanted = [path for path in HERE.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    kept = {parent for path in wanted for parent in (path, *path.parents)}
    return [str(path) for path in HERE.rglob("*") if (path.is_dir() or path.match("test_*.py")) and path not in kept]


_checkout = _bare_checkout()
_checkout.prepare()
collect_ignore = _not_for_a_gpu() if _checkout.missing_packages() else []

GGUF_SETTINGS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500.0,
}

TINY_CONFIG: dict[str, Any] = {
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
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 48},
}


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where built kernels stay between runs: TOKA_CACHE, or the user's cache directory."""
    return Path(os.environ.get("TOKA_CACHE", Path.home() / ".cache" / "toka"))


@pytest.fixture(scope="session")
def cpp_kernels(cache_dir: Path) -> Path:
    """The C++ kernels, built (once a machine) and loaded; the library's path."""
    from toka.kernels.cpp.build import build, load

    library = build(cache_dir)
    load(library)
    return library


@pytest.fixture(scope="session")
def default_model(cache_dir: Path) -> ModelSource:
    """SmolLM2-135M-Instruct, fetched once into the cache directory."""
    from toka.errors import ConfigError
    from toka.model_source import locate

    try:
        return locate("default", None, cache_dir)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → a directory with config.json and a safetensors file of small random weights; without a tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = _write_random(tmp_path_factory.mktemp(family), TINY_CONFIG | TINY_FAMILIES[family])
        return made[family]

    return make


def _write_random(directory: Path, config: dict[str, Any]) -> Path:
    import torch
    from safetensors.torch import save_file

    from toka.models.registry import build_model
    from toka.models.spec import read_spec
    from toka.weights.weight import Weight

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


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """write_gguf(path, tensors, arch="llama", settings={}, metadata={}) → path.

    tensors: name → float array, or (array, type) to quantise, or (uint8 array, type, True) for bytes that are quantised already.
    settings: below the architecture's name, added to GGUF_SETTINGS (None removes one). metadata: with full keys.
    """
    import gguf

    def write(
        path: Path,
        tensors: Mapping[str, Any],
        arch: str = "llama",
        settings: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (GGUF_SETTINGS | dict(settings or {})).items():
            if value is not None:
                _add(writer, f"{arch}.{key}", value)
        for key, value in ({"tokenizer.ggml.eos_token_id": 2} | dict(metadata or {})).items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            array, kind, *raw = tensor if isinstance(tensor, tuple) else (tensor, gguf.GGMLQuantizationType.F32)
            data = array if raw else gguf.quantize(np.ascontiguousarray(array, np.float32), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
