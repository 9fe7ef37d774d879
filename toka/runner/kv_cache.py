"""The paged KV cache: one tensor, seen as a key and a value cache per layer (floor 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVCacheShape:
    """What fixes the size of a block: layers, KV heads, head_dim, tokens in a block, and the dtype of keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes in all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        return self.bytes_per_block // self.block_size


class KVCache:
    """keys[i], values[i]: layer i's caches [num_blocks, num_kv_heads, block_size, head_dim]."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device):
        self.shape, self.num_blocks = shape, num_blocks
        # Not zeroed: on CPU the system hands out each page when it is first written, so a large cache costs nothing until used.
        self._storage = torch.empty(
            (shape.num_layers, 2, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self.keys = [self._storage[layer, 0] for layer in range(shape.num_layers)]
        self.values = [self._storage[layer, 1] for layer in range(shape.num_layers)]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.shape.bytes_per_block
