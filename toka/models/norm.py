"""RMSNorm (Zhang and Sennrich, 2019). Legend: N any leading dims, C the dim that is normalised."""

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
