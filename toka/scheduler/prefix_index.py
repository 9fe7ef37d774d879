"""Which block holds the KV of which prefix: 128-bit hashes, chained from block to block from a secret root.

The key of a block is BLAKE2b over the key of the block before it and its own token ids; the chain starts from a hash of
the cache salt, keyed with a secret of this process. Keys never leave the process, so nobody outside knows what is hashed
before their own tokens: equal keys mean equal salt and equal tokens from the start (up to a chance of 2^-128 that nobody
can steer), and no prefix is ever found under another salt.
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

    __slots__ = ("_block_size", "keys")

    def __init__(self, secret: bytes, salt: str, block_size: int):
        self._block_size = block_size
        root = blake2b(
            salt.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES, key=secret, person=b"cache salt"
        ).digest()
        self.keys = [root]  # keys[i + 1] belongs to block i

    def keys_of(self, start: int, stop: int) -> list[bytes]:
        """Keys of the request's blocks start .. stop - 1, which are known."""
        return self.keys[start + 1 : stop + 1]

    @property
    def num_blocks(self) -> int:
        return len(self.keys) - 1

    def extend(self, tokens: I32, num_blocks: int) -> None:
        """Make the keys of the first num_blocks blocks known; tokens: int32, at least num_blocks * block_size of them."""
        first, size = self.num_blocks, self._block_size
        if first < num_blocks:
            content = tokens[first * size : num_blocks * size].tobytes()
            block_bytes = len(content) // (num_blocks - first)
            for start in range(0, len(content), block_bytes):
                self.append(content[start : start + block_bytes])

    def append(self, content: bytes) -> bytes:
        """Make the key of the next block known and return it; content: its token ids, int32 bytes."""
        keys = self.keys
        key = blake2b(keys[-1] + content, digest_size=KEY_BYTES).digest()
        keys.append(key)
        return key

    def fork(self) -> KeyChain:
        """An independent chain with the same keys so far (the samples of one prompt)."""
        other = object.__new__(KeyChain)
        other._block_size, other.keys = self._block_size, self.keys.copy()
        return other


class PrefixIndex:
    """key -> block, and the only writer of that map. A block has at most one key, a key at most one block."""

    def __init__(self, num_blocks: int):
        self._block_of: dict[bytes, int] = {}
        self._key_of = np.full(num_blocks, None, dtype=np.object_)  # bytes, or None where the block has no key
        self._is_cached = np.zeros(num_blocks, dtype=np.bool_)
        self._holds_output = np.zeros(num_blocks, dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._block_of

    def is_cached(self, blocks: I32) -> npt.NDArray[np.bool_]:
        """Whether each block can be found by its key; bool, shape of blocks."""
        return self._is_cached[blocks]

    def mark_output(self, blocks: I32) -> None:
        """These blocks hold generated tokens; those that are not cached are passed over."""
        self._holds_output[blocks[self._is_cached[blocks]]] = True

    def hold_output(self, blocks: I32) -> bool:
        """Whether any of these cached blocks holds generated tokens: whoever finds it goes on with a conversation."""
        return bool(self._holds_output[blocks].any())

    def longest_prefix(self, chain: KeyChain, max_blocks: int) -> I32:
        """The blocks that hold the first tokens of a request, as many as are known, at most max_blocks; int32."""
        block_of = self._block_of
        found: list[int] = []
        for key in chain.keys_of(0, max_blocks):
            block = block_of.get(key)
            if block is None:
                break
            found.append(block)
        return np.array(found, dtype=np.int32)

    def register(self, keys: list[bytes], blocks: I32) -> None:
        """Make full blocks findable. Where another block holds the same content already, that one stays the known one."""
        taken = self._is_cached[blocks]
        if np.count_nonzero(taken):
            raise InvariantError(f"block {blocks[taken][0]} is in the prefix index already")
        block_of = self._block_of
        numbers: list[int] = blocks.tolist()
        known = [block_of.setdefault(key, block) for key, block in zip(keys, numbers, strict=True)]
        if known != numbers:
            first = np.array(known, dtype=np.int32) == blocks
            blocks, keys = blocks[first], [key for key, kept in zip(keys, first.tolist(), strict=True) if kept]
        self._key_of[blocks] = keys
        self._is_cached[blocks] = True

    def forget(self, blocks: I32) -> None:
        """The content of these cached blocks is about to be overwritten."""
        cached = self._is_cached[blocks]
        if not cached.all():
            raise InvariantError(f"block {blocks[~cached][0]} is not in the prefix index")
        block_of = self._block_of
        keys: list[bytes] = self._key_of[blocks].tolist()
        for key in keys:
            del block_of[key]
        self._key_of[blocks] = None
        self._is_cached[blocks] = False
        self._holds_output[blocks] = False

    def check_invariants(self) -> None:
        """Raise InvariantError unless the two directions of the map agree."""
        back = {key: block for block, key in enumerate(self._key_of.tolist()) if key is not None}
        if back != self._block_of or np.flatnonzero(self._is_cached).tolist() != sorted(back.values()):
            raise InvariantError("the prefix index disagrees with itself")
