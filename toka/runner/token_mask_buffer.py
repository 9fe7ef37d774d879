"""Where the masks of a step lie on the device (floor 5)."""

from __future__ import annotations

import torch

from toka.plan import TokenMasks


class TokenMaskBuffer:
    """Room for the masks of one step: [max_masks, num_words] int32. On the CPU, where they already lie, it takes none."""

    def __init__(self, max_masks: int, num_words: int, device: torch.device):
        self._on_device: torch.Tensor | None = None
        if device.type != "cpu":
            # One buffer on the host is enough: masks of a step are made when the step before it, which read the last ones, is done.
            self._on_host = torch.empty((max_masks, num_words), dtype=torch.int32, pin_memory=device.type == "cuda")
            self._on_device = torch.empty((max_masks, num_words), dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        """Size on the device."""
        return 0 if self._on_device is None else self._on_device.nbytes

    def send(self, masks: TokenMasks) -> torch.Tensor:
        """The masks as the device sees them, int32 [at least C, num_words], behind what it was given to do before."""
        given = torch.from_numpy(masks)
        if self._on_device is None:
            return given
        num_masks = len(masks)
        self._on_host[:num_masks].copy_(given)
        self._on_device[:num_masks].copy_(self._on_host[:num_masks], non_blocking=True)
        return self._on_device
