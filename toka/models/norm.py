"""RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016). Legend: N any leading dims, C the dim that is normalised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toka.weights.weight import Weight


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim; the quotient in float32 and cast back before the product, as transformers does."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = Weight((size,), dtype)
        self.eps = eps

    def forward(self, x_NC: Tensor) -> Tensor:
        wide_NC = x_NC.to(torch.float32)
        scale_N1 = torch.rsqrt(wide_NC.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.as_tensor() * (wide_NC * scale_N1).to(x_NC.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) · weight + bias over the last dim, all of it in float32 and cast back at the end, as PyTorch does."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = Weight((size,), dtype)
        self.bias = Weight((size,), dtype)
        self.eps = eps

    def forward(self, x_NC: Tensor) -> Tensor:
        wide_NC = x_NC.to(torch.float32)
        centred_NC = wide_NC - wide_NC.mean(-1, keepdim=True)
        scale_N1 = torch.rsqrt(centred_NC.pow(2).mean(-1, keepdim=True) + self.eps)
        weight_C, bias_C = (each.as_tensor().to(torch.float32) for each in (self.weight, self.bias))
        return (centred_NC * scale_N1 * weight_C + bias_C).to(x_NC.dtype)
