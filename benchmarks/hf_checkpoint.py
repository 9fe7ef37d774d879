"""The benchmarks' peers load Hugging Face directories: the weights that toka serves, written as one."""

from __future__ import annotations

from pathlib import Path

from toka.model_source import ModelSource


def write_hf_checkpoint(source: ModelSource, target: Path) -> None:
    """Write the model as config.json, tokenizer and model.safetensors, dequantised by transformers to float32, into the folder `target`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.path.name} if source.kind == "gguf" else {}
    folder = str(source.path.parent if source.kind == "gguf" else source.path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    AutoTokenizer.from_pretrained(folder, **where).save_pretrained(target)
    vars(model.config).pop("quantization_config", None)  # the weights are plain by now
    model.config.save_pretrained(target)
    kept = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
