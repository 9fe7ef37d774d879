"""Hugging Face transformers on the same shape and the same batches: `generate` with a static cache and, where asked for, compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gpu_sections.measure import Deadline, synchronize
from gpu_sections.shapes import Shape


def measure(shape: Shape, device: torch.device, deadline: Deadline, *, compiled: bool) -> Iterator[tuple[str, Any]]:
    """Yields tokens per second of each batch: the best of what fits in the time, after the run that compiles."""
    model = random_llama(shape, device)
    random = torch.Generator().manual_seed(0)
    for batch, prompt_len, num_tokens in shape.generate:
        prompts = torch.randint(2, shape.hf_config["vocab_size"], (batch, prompt_len), generator=random).to(device)
        began = time.perf_counter()
        seconds = [_generate(model, prompts, num_tokens, compiled) for _ in range(2)]  # compiles; captures
        first_s = time.perf_counter() - began
        seconds = seconds[1:]
        while len(seconds) < 4 and deadline.left_s > min(seconds):
            seconds.append(_generate(model, prompts, num_tokens, compiled))
        yield (
            f"batch_{batch}",
            {"tokens_per_s": batch * num_tokens / min(seconds), "seconds": min(seconds), "first_two_s": first_s},
        )


def random_llama(shape: Shape, device: torch.device) -> nn.Module:
    """transformers' model of this shape with the weights that it starts training with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(shape.hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    make: Any = AutoModelForCausalLM.from_config
    with device:
        model: nn.Module = make(config, dtype=getattr(torch, fields["dtype"]))
    return model.eval()


@torch.inference_mode()
def _generate(model: Any, prompts: torch.Tensor, num_tokens: int, compiled: bool) -> float:
    """Seconds of one call. transformers compiles by itself where the cache is static and the device is CUDA."""
    synchronize(prompts.device)
    began = time.perf_counter()
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=not compiled,
        pad_token_id=0,
    )
    synchronize(prompts.device)
    if out.shape != (prompts.shape[0], prompts.shape[1] + num_tokens):
        raise AssertionError(f"transformers returned {list(out.shape)}")
    return time.perf_counter() - began
