"""Linear projection. Legend: N rows of a batch, I in features, O out features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toka.weights.weight import Weight


class Linear(nn.Module):
    """x · weightᵀ + bias; the weight's format decides which op computes it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = Weight((out_features, in_features), dtype)
        self.bias = Weight((out_features,), dtype) if bias else None

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.weight.linear(x_NI, None if self.bias is None else self.bias.as_tensor())
