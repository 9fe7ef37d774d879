"""Tables that stay on the device and receive changes only: block table, sampling settings, last sampled tokens (floor 5).

Legend: M rows of the request table, W blocks that one request can hold.
"""

from __future__ import annotations

import numpy as np
import torch

from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BlockTableChanges, RowSettings


class DeviceTables:
    """All state of the running requests on the device, one row a request.

    block_table int32 [M, W]; last_token int32 [M]; temperature, top_p, min_p float32 [M]; top_k int32 [M]; seed int64 [M];
    held_back_ids int32 [M, MAX_STOP_TOKEN_IDS]; held_back_until int32 [M].
    """

    def __init__(self, max_rows: int, max_blocks_per_row: int, device: torch.device):
        def table(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros((max_rows, *width), dtype=dtype, device=device)

        self._device = device
        self._block_table = table(torch.int32, max_blocks_per_row)
        self._settings = {
            "temperature": table(torch.float32),
            "top_k": table(torch.int32),
            "top_p": table(torch.float32),
            "min_p": table(torch.float32),
            "seed": table(torch.int64),
            "held_back_ids": table(torch.int32, MAX_STOP_TOKEN_IDS),
            "held_back_until": table(torch.int32),
        }
        self._last_token = table(torch.int32)

    def values(self) -> dict[str, torch.Tensor]:
        """The tables by the names that the step graph knows them under; the tensors never move."""
        return {"block_table": self._block_table, "last_token": self._last_token, **self._settings}

    def apply(self, table: BlockTableChanges, settings: RowSettings) -> None:
        """Make a plan's changes. Steps run in order, so this must happen after the step before was launched."""
        if len(table.rows):
            place = (self._index(table.rows), self._index(table.columns))
            self._block_table[place] = self._values(table.blocks)
        if len(settings.rows):
            rows = self._index(settings.rows)
            for name, column in self._settings.items():
                column[rows] = self._values(getattr(settings, name))

    def _values(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _index(self, array: np.ndarray) -> torch.Tensor:
        return self._values(array.astype(np.int64))  # PyTorch indexes by int64 only
