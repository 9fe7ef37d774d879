"""Tables that stay on the device and receive changes only: block table, sampling settings, last sampled tokens (floor 5).

Legend: M rows of the request table, W blocks that one request can hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BlockTableChanges, RowSettings
from toka.runner.staging import ArraySpec, Staging


class DeviceTables:
    """All state of the running requests on the device, one row a request.

    block_table int32 [M, W]; last_token int32 [M]; temperature, top_p, min_p float32 [M]; top_k int32 [M]; seed int64 [M];
    held_back_ids int32 [M, MAX_STOP_TOKEN_IDS]; held_back_until int32 [M].

    Changes come through a Staging with the arrays of `staged_arrays`, `max_blocks` entries of the block table and `max_settings` rows
    of settings at a time.
    """

    def __init__(
        self, max_rows: int, max_blocks_per_row: int, device: torch.device, *, max_blocks: int, max_settings: int
    ):
        def table(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros((max_rows, *width), dtype=dtype, device=device)

        self._max_blocks, self._max_settings = max_blocks, max_settings
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

    def staged_arrays(self) -> dict[str, ArraySpec]:
        """What `stage` writes. Places are int64: PyTorch writes to no others."""
        columns = {
            f"new.{name}": ArraySpec(column.dtype, self._max_settings, tuple(column.shape[1:]))
            for name, column in self._settings.items()
        }
        return {
            "new.table_places": ArraySpec(torch.int64, self._max_blocks),
            "new.rows": ArraySpec(torch.int64, self._max_settings),
            "new.blocks": ArraySpec(torch.int32, self._max_blocks),
            **columns,
        }

    def parts(self, table: BlockTableChanges, settings: RowSettings) -> Iterator[tuple[slice, slice]]:
        """Which of the changes fit the staging together; one part, but for the steps in which very many requests begin."""
        num_parts = max(-(-len(table.rows) // self._max_blocks), -(-len(settings.rows) // self._max_settings), 1)
        for i in range(num_parts):
            yield (
                slice(i * self._max_blocks, (i + 1) * self._max_blocks),
                slice(i * self._max_settings, (i + 1) * self._max_settings),
            )

    def stage(
        self, staging: Staging, table: BlockTableChanges, settings: RowSettings, part: tuple[slice, slice]
    ) -> None:
        """Write one part of a plan's changes for the device to read."""
        blocks, rows = part
        if len(table.rows):
            width = self._block_table.shape[1]
            staging.write("new.table_places", table.rows[blocks].astype(np.int64) * width + table.columns[blocks])
            staging.write("new.blocks", table.blocks[blocks])
        if len(settings.rows):
            staging.write("new.rows", settings.rows[rows])
            for name in self._settings:
                staging.write(f"new.{name}", getattr(settings, name)[rows])

    def apply(
        self, staging: Staging, table: BlockTableChanges, settings: RowSettings, part: tuple[slice, slice]
    ) -> None:
        """Make the changes of a part that was staged and sent. Steps run in order, so the step before must have been launched."""
        blocks, rows = part
        if num_blocks := len(table.rows[blocks]):
            places = staging.on_device("new.table_places", num_blocks)
            self._block_table.view(-1).put_(places, staging.on_device("new.blocks", num_blocks))
        if num_rows := len(settings.rows[rows]):
            changed = staging.on_device("new.rows", num_rows)
            for name, column in self._settings.items():
                column.index_copy_(0, changed, staging.on_device(f"new.{name}", num_rows))
