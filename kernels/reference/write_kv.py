"""Reference of `toka::write_kv`: scatter of keys and values into the paged cache."""

from __future__ import annotations

from torch import Tensor


def write_kv(key_THD: Tensor, value_THD: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """Store one key and value per token where its slot says; slot -1 (padding) is not written.

    key_THD, value_THD: [T, Hk, D]. key_cache, value_cache: [num_blocks, Hk, block_size, D], changed in place.
    slots_T: int32 or int64 [T], block * block_size + offset.
    """
    block_size = key_cache.shape[2]
    written = slots_T >= 0
    slots = slots_T[written].long()
    blocks, offsets = slots // block_size, slots % block_size
    key_cache[blocks, :, offsets] = key_THD[written].to(key_cache.dtype)
    value_cache[blocks, :, offsets] = value_THD[written].to(value_cache.dtype)
