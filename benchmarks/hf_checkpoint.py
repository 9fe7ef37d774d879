"""The benchmarks' peers load Hugging Face directories: the weights and the tokenizer that toka serves, written as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toka.model_source import ModelSource


def write_hf_checkpoint(source: ModelSource, target: Path) -> None:
    """Write config.json, tokenizer and model.safetensors, dequantised by transformers to float32, into the folder `target`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, where = _as_transformers_loads_it(source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    write_hf_tokenizer(source, target)
    vars(model.config).pop("quantization_config", None)  # the weights are plain by now
    model.config.save_pretrained(target)
    kept = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})


def write_hf_tokenizer(source: ModelSource, target: Path) -> None:
    """The tokenizer alone."""
    from transformers import AutoTokenizer

    folder, where = _as_transformers_loads_it(source)
    AutoTokenizer.from_pretrained(folder, **where).save_pretrained(target)


def _as_transformers_loads_it(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes."""
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}
