"""Which block holds the KV of which prefix: 128-bit keyed hashes, chained from block to block.

The key of a block is BLAKE2b over the key of the block before it and its own token ids, keyed with a secret of this process; the
chain starts from a hash of the cache salt. So equal keys mean equal salt and equal tokens from the start (up to a chance of
2^-128 that nobody outside can steer), and no prefix is ever found under another salt.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from toka.errors import InvariantError
from toka.plan import I32

KEY_BYTES = 16


class KeyChain:
    """The keys of one request's full blocks, each computed once."""

    __slots__ = ("_block_size", "_secret", "keys")

    def __init__(self, secret: bytes, salt: str, block_size: int):
        self._secret, self._block_size = secret, block_size
        root = blake2b(
            salt.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES, key=secret, person=b"cache salt"
        ).digest()
        self.keys = [root]  # keys[i + 1] belongs to block i

    def key(self, block: int) -> bytes:
        """Key of the request's block number `block`, which `extend` has seen."""
        return self.keys[block + 1]

    @property
    def num_blocks(self) -> int:
        return len(self.keys) - 1

    def extend(self, tokens: I32, num_blocks: int) -> None:
        """Make the keys of the first num_blocks blocks known; tokens: int32, at least num_blocks * block_size of them."""
        first, size, secret = self.num_blocks, self._block_size, self._secret
        if num_blocks <= first:
            return
        key = self.keys[-1]
        content = tokens[first * size : num_blocks * size].tobytes()
        block_bytes = len(content) // (num_blocks - first)
        for start in range(0, len(content), block_bytes):
            key = blake2b(key + content[start : start + block_bytes], digest_size=KEY_BYTES, key=secret).digest()
            self.keys.append(key)

    def fork(self) -> KeyChain:
        """An independent chain with the same keys so far (the samples of one prompt)."""
        other = object.__new__(KeyChain)
        other._secret, other._block_size, other.keys = self._secret, self._block_size, self.keys.copy()
        return other


class PrefixIndex:
    """key -> block, and the only writer of that map. A block has at most one key, a key at most one block."""

    def __init__(self, num_blocks: int):
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._is_cached = np.zeros(num_blocks, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._block_of

    def is_cached(self, blocks: I32) -> npt.NDArray[np.bool_]:
        """Whether each block can be found by its key; bool, shape of blocks."""
        return self._is_cached[blocks]

    def longest_prefix(self, chain: KeyChain, max_blocks: int) -> I32:
        """The blocks that hold the first tokens of a request, as many as are known, at most max_blocks; int32."""
        block_of = self._block_of
        found: list[int] = []
        for key in chain.keys[1 : max_blocks + 1]:
            block = block_of.get(key)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int32)

    def register(self, key: bytes, block: int) -> None:
        """Make a full block findable. Where another block holds the same content already, that one stays the known one."""
        if self._key_of[block] is not None:
            raise InvariantError(f"block {block} is in the prefix index already")
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self._is_cached[block] = True

    def forget(self, blocks: I32) -> None:
        """The content of these cached blocks is about to be overwritten."""
        for block in blocks.tolist():
            key = self._key_of[block]
            if key is None:
                raise InvariantError(f"block {block} is not in the prefix index")
            del self._block_of[key]
            self._key_of[block] = None
        self._is_cached[blocks] = False

    def check_invariants(self) -> None:
        """Raise InvariantError unless the two directions of the map agree."""
        back = {key: block for block, key in enumerate(self._key_of) if key is not None}
        if back != self._block_of or np.flatnonzero(self._is_cached).tolist() != sorted(back.values()):
            raise InvariantError("the prefix index disagrees with itself")
