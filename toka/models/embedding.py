"""Token embedding. Legend: T tokens, R rows, C hidden size, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toka.weights.weight import Weight


class Embedding(nn.Module):
    """Rows of a [V, C] table; of a model with a tied head it is the LM head as well."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = Weight((vocab_size, hidden_size), dtype)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return self.weight.embedding(token_ids_T)

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """The table used as LM head; [R, C] → [R, V]."""
        return self.weight.linear(hidden_RC)
