"""Gated MLP. Legend: T tokens, C hidden size, I intermediate size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toka.models.linear import Linear
from toka.models.spec import ModelSpec

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias, dtype)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias, dtype)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, spec.mlp_bias, dtype)
        self.activation = ACTIVATION_FUNCTIONS[spec.activation]

    def forward(self, hidden_TC: Tensor) -> Tensor:
        inner_TI = self.activation(self.gate_proj(hidden_TC)) * self.up_proj(hidden_TC)
        down_TC: Tensor = self.down_proj(inner_TI)
        return down_TC
