"""What stays on the device of the requests whose logits are adjusted: their settings, and which token stands in which slot (floor 5).

Everything here happens behind the graphs of steps that have such requests; all other steps know nothing of it. Of a slot's token
nothing is promised but that it is right for the requests that asked: each writes its own, those that were cached included.

Legend: M rows of the request table, A tokens of a step that belong to such requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES
from toka.plan import Adjusting, AdjustmentSettings

# In the order in which `toka::adjust_logits` takes them.
TABLES = ("num_prompt_tokens", "penalties", "bias_ids", "biases", "bad_words")


class AdjustmentTables:
    """num_prompt_tokens int32 [M]; penalties float32 [M, 3]; bias_ids int32, biases float32 [M, MAX_LOGIT_BIASES]; bad_words int32
    [M, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS]; token_of_slot int32, one for each slot of the KV cache."""

    def __init__(self, max_rows: int, block_size: int, device: torch.device):
        ints, floats = torch.int32, torch.float32
        self._device, self._block_size = device, block_size
        self._tables = {
            "num_prompt_tokens": torch.zeros(max_rows, dtype=ints, device=device),
            "penalties": torch.zeros((max_rows, 3), dtype=floats, device=device),
            "bias_ids": torch.full((max_rows, MAX_LOGIT_BIASES), -1, dtype=ints, device=device),
            "biases": torch.zeros((max_rows, MAX_LOGIT_BIASES), dtype=floats, device=device),
            "bad_words": torch.full((max_rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, dtype=ints, device=device),
        }
        self._token_of_slot = torch.zeros(0, dtype=ints, device=device)

    def values(self) -> dict[str, Tensor]:
        """The tables by the names that the step graph knows them under."""
        return {**self._tables, "token_of_slot": self._token_of_slot}

    @property
    def num_bytes(self) -> int:
        """Size of the tables of rows. What is kept of slots comes with the KV cache, of which it is some thousandths."""
        return sum(table.nbytes for table in self._tables.values())

    def attach(self, num_blocks: int) -> None:
        """There is a KV cache of so many blocks now."""
        self._token_of_slot = torch.zeros(num_blocks * self._block_size, dtype=torch.int32, device=self._device)

    def take(self, adjusting: Adjusting, step: Mapping[str, Tensor]) -> None:
        """Apply what a plan says of rows that begin, and remember the tokens that its step computed. step: its inputs by name.

        Nothing must have been drawn yet for these rows in the step, since their newest tokens are read from last_token.
        """
        if adjusting.settings is not None:
            self._apply(adjusting.settings)
        places_A = self._sent(adjusting.places).long()
        ids_A, rows_A = step["token_ids"][places_A], step["token_rows"][places_A].long()
        ids_A = torch.where(ids_A < 0, step["last_token"][(-1 - ids_A).clamp(min=0).long()], ids_A)
        positions_A = step["positions"][places_A]
        blocks_A = step["block_table"][rows_A, (positions_A // self._block_size).long()]
        slots_A = blocks_A.long() * self._block_size + positions_A % self._block_size
        self._token_of_slot.index_copy_(0, slots_A, ids_A)

    def _apply(self, settings: AdjustmentSettings) -> None:
        rows = self._sent(settings.rows).long()
        for name in TABLES:
            self._tables[name].index_copy_(0, rows, self._sent(getattr(settings, name)))
        # Rows may share cached slots, and then write the same tokens there.
        self._token_of_slot.index_put_((self._sent(settings.cached_slots),), self._sent(settings.cached_tokens))

    def _sent(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
