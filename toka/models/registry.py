"""model_type → the family that implements it."""

from __future__ import annotations

import torch

from toka.models.decoder import CausalLM
from toka.models.encoder import Encoder
from toka.models.encoder_spec import EncoderSpec
from toka.models.llama import Llama
from toka.models.qwen3 import Qwen3
from toka.models.spec import ModelSpec

FAMILIES: dict[str, type[CausalLM]] = {
    "llama": Llama,
    "mistral": Llama,
    "qwen2": Llama,
    "qwen3": Qwen3,
}


def build_model(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "meta", *, with_head: bool = True
) -> CausalLM:
    """The model with uninitialised weights of this dtype; on the meta device (the default) without storage.

    `toka.weights.loader.load_weights` gives it storage and values. with_head: F for a model whose logits nobody wants.
    """
    with torch.device(device):
        return FAMILIES[spec.model_type](spec, dtype, with_head=with_head).eval()


def build_encoder(spec: EncoderSpec, dtype: torch.dtype, device: torch.device | str = "meta") -> Encoder:
    """The same for an encoder."""
    with torch.device(device):
        return Encoder(spec, dtype).eval()
