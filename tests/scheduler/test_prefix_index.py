from __future__ import annotations

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.prefix_index import KeyChain, PrefixIndex

TOKENS = np.arange(12, dtype=np.int32)


def chain(tokens: I32 = TOKENS, *, secret: bytes = b"secret", salt: str = "") -> KeyChain:
    made = KeyChain(secret, salt, block_size=4)
    made.extend(tokens, len(tokens) // 4)
    return made


def test_keys_are_128_bits_and_chained() -> None:
    changed = TOKENS.copy()
    changed[5] += 1
    ours, theirs = chain().keys_of(0, 3), chain(changed).keys_of(0, 3)
    assert all(len(key) == 16 for key in ours)
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True, False, False]


@pytest.mark.parametrize("other", [chain(secret=b"another"), chain(salt="tenant"), chain(salt="\ud800")])
def test_secret_and_salt_change_every_key(other: KeyChain) -> None:
    assert not set(chain().keys_of(0, 3)) & set(other.keys_of(0, 3))


def test_a_salt_is_not_a_block_of_tokens() -> None:
    """Nobody can pass tokens off as another tenant's salt, or extend that tenant's chain."""
    salted = KeyChain(b"secret", TOKENS[:4].tobytes().decode(), block_size=4)
    assert salted.keys[0] not in chain().keys


def test_keys_come_out_alike_in_one_go_or_block_by_block() -> None:
    by_block = KeyChain(b"secret", "", block_size=4)
    for num_blocks in (1, 1, 3):
        by_block.extend(TOKENS, num_blocks)
    assert by_block.keys == chain().keys
    by_content = KeyChain(b"secret", "", block_size=4)
    assert by_content.append(TOKENS[:4].tobytes()) == chain().keys_of(0, 1)[0]


def test_forks_go_their_own_ways() -> None:
    root = chain(TOKENS[:4])
    fork = root.fork()
    fork.extend(TOKENS, 3)
    assert (root.num_blocks, fork.num_blocks) == (1, 3) and fork.keys == chain().keys


def test_longest_prefix_ends_at_the_first_unknown_block() -> None:
    index, keys = PrefixIndex(8), chain()
    index.register([keys.keys_of(0, 1)[0], keys.keys_of(2, 3)[0]], np.array([5, 6], dtype=np.int32))
    assert index.longest_prefix(keys, 3).tolist() == [5]
    index.register(keys.keys_of(1, 2), np.array([7], dtype=np.int32))
    assert index.longest_prefix(keys, 3).tolist() == [5, 7, 6]
    assert index.longest_prefix(keys, 2).tolist() == [5, 7]
    assert index.longest_prefix(chain(salt="other"), 3).tolist() == []


def test_the_first_block_with_some_content_stays_the_known_one() -> None:
    index, [key] = PrefixIndex(4), chain().keys_of(0, 1)
    index.register([key], np.array([1], dtype=np.int32))
    index.register([key], np.array([2], dtype=np.int32))
    assert index.is_cached(np.arange(4, dtype=np.int32)).tolist() == [False, True, False, False]
    index.check_invariants()


def test_a_forgotten_block_is_not_found_and_may_be_registered_anew() -> None:
    index, [key] = PrefixIndex(4), chain().keys_of(0, 1)
    block = np.array([1], dtype=np.int32)
    index.register([key], block)
    index.forget(block)
    assert key not in index and len(index) == 0
    index.register([key], block)
    index.check_invariants()


def test_registering_or_forgetting_twice_is_an_error() -> None:
    index, block = PrefixIndex(4), np.array([1], dtype=np.int32)
    index.register([b"one"], block)
    with pytest.raises(InvariantError):
        index.register([b"two"], block)
    index.forget(block)
    with pytest.raises(InvariantError):
        index.forget(block)
