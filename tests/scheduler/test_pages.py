"""Pages are never lost, never given to two, and found again by what they hold."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from inferneo_jax.errors import ConfigError
from inferneo_jax.scheduler.block_pool import NO_PAGE, PagePool, hash_page, salt_hash


def _chain(tokens: list[int], page_len: int, salt: bytes = b"") -> list[bytes]:
    hashes, last = [], salt_hash(salt)
    for start in range(0, len(tokens) - page_len + 1, page_len):
        last = hash_page(last, tokens[start : start + page_len])
        hashes.append(last)
    return hashes


class Pages(RuleBasedStateMachine):
    """Random readers that allocate, cache, match and release."""

    @initialize(num_pages=st.integers(2, 12))
    def make(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages, page_len=2)
        self.readers: list[list[int]] = []
        self.contents: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=10))
    def admit(self, tokens: list[int]) -> None:
        hashes = _chain(tokens, 2)
        shared = self.pool.match_prefix(hashes)
        assert [self.contents[page] for page in shared] == hashes[: len(shared)]
        own = self.pool.allocate(self.pool.pages_for(len(tokens)) - len(shared))
        if own is None:
            self.pool.release(shared)
            return
        assert NO_PAGE not in own
        assert not {page for reader in self.readers for page in reader} & set(own)
        pages = shared + own
        for page, digest in list(zip(pages, hashes, strict=False))[len(shared) :]:
            self.pool.cache_page(page, digest)
            self.contents[page] = digest
        self.readers.append(pages)

    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        if self.readers:
            self.pool.release(self.readers.pop(which % len(self.readers)))

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {page for reader in self.readers for page in reader}
        assert self.pool.num_used == len(held)
        assert self.pool.num_used + self.pool.num_available == self.pool.num_pages

    def teardown(self) -> None:
        for reader in self.readers:
            self.pool.release(reader)
        assert self.pool.num_used == 0


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, deadline=None)


def test_the_deepest_page_of_the_oldest_reader_goes_first() -> None:
    pool = PagePool(5, page_len=1)
    first, second = _chain([1, 2], 1), _chain([7, 8], 1)
    for chain in (first, second):
        pages = pool.allocate(2)
        assert pages
        for page, digest in zip(pages, chain, strict=True):
            pool.cache_page(page, digest)
        pool.release(pages)
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


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(4, page_len=2)
    assert pool.allocate(4) is None
    assert pool.num_available == 3
    with pytest.raises(ConfigError):
        PagePool(1, page_len=2)


def test_tokens_of_any_size_hash_apart() -> None:
    ids = np.array([1, 2**31 - 1]).tolist()
    assert hash_page(salt_hash(b""), ids) != hash_page(salt_hash(b""), ids[::-1])
