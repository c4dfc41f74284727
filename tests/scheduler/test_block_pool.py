"""Blocks are never lost, never given to two, and found again by what they hold."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from inferneo_jax.errors import ConfigError
from inferneo_jax.scheduler.block_pool import NULL_BLOCK, BlockPool, hash_block, salt_hash


def _chain(tokens: list[int], block_len: int, salt: bytes = b"") -> list[bytes]:
    hashes, last = [], salt_hash(salt)
    for start in range(0, len(tokens) - block_len + 1, block_len):
        last = hash_block(last, tokens[start : start + block_len])
        hashes.append(last)
    return hashes


class Blocks(RuleBasedStateMachine):
    """Random readers that allocate, cache, match and release."""

    @initialize(num_blocks=st.integers(2, 12))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, block_len=2)
        self.readers: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def admit(self, tokens: list[int]) -> None:
        hashes = _chain(tokens, 2)
        shared = self.pool.match_prefix(hashes)
        assert [self.contents[block] for block in shared] == hashes[: len(shared)]
        own = self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(shared))
        if own is None:
            self.pool.release(shared)
            return
        assert NULL_BLOCK not in own
        assert not {block for reader in self.readers for block in reader} & set(own)
        blocks = shared + own
        for block, digest in list(zip(blocks, hashes, strict=False))[len(shared) :]:
            self.pool.cache_block(block, digest)
            self.contents[block] = digest
        self.readers.append(blocks)

    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        if self.readers:
            self.pool.release(self.readers.pop(which % len(self.readers)))

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {block for reader in self.readers for block in reader}
        assert self.pool.num_used == len(held)
        assert self.pool.num_used + self.pool.num_available == self.pool.num_blocks

    def teardown(self) -> None:
        for reader in self.readers:
            self.pool.release(reader)
        assert self.pool.num_used == 0


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, deadline=None)


def test_the_deepest_block_of_the_oldest_reader_goes_first() -> None:
    pool = BlockPool(5, block_len=1)
    first, second = _chain([1, 2], 1), _chain([7, 8], 1)
    for chain in (first, second):
        blocks = pool.allocate(2)
        assert blocks
        for block, digest in zip(blocks, chain, strict=True):
            pool.cache_block(block, digest)
        pool.release(blocks)
    assert pool.allocate(1)
    assert len(pool.match_prefix(first)) == 1
    assert len(pool.match_prefix(second)) == 2


def test_hashes_know_all_before_and_the_salt() -> None:
    hashes = {
        digest
        for tokens, salt in [([1, 2, 3, 4], b""), ([9, 9, 3, 4], b""), ([1, 2, 3, 4], b"key")]
        for digest in _chain(tokens, 2, salt)
    }
    assert len(hashes) == 6


def test_too_few_blocks_change_nothing() -> None:
    pool = BlockPool(4, block_len=2)
    assert pool.allocate(4) is None
    assert pool.num_available == 3
    with pytest.raises(ConfigError):
        BlockPool(1, block_len=2)


def test_tokens_of_any_size_hash_apart() -> None:
    ids = np.array([1, 2**31 - 1]).tolist()
    assert hash_block(salt_hash(b""), ids) != hash_block(salt_hash(b""), ids[::-1])
