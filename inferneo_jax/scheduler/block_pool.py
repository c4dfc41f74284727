"""Blocks of the KV cache: the free list, reference counts and the prefix cache.

A block holds the keys and values of ``block_len`` tokens. It is a number here; the device's cache
arrays have a page for each. A full block is found again by the hash of its tokens, of all tokens
before it and of a salt. A block that nobody reads any more stays cached until its memory is needed:
the least recently used one is evicted first, and of one sequence's blocks the last one, since a
prefix is useful without its tail but not the other way round.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile

from inferneo_jax.errors import ConfigError

NULL_BLOCK = 0
"""Block 0 is never allocated: padding writes to it."""


class BlockPool:
    """All blocks of one data-parallel rank's cache. Not thread-safe."""

    def __init__(self, num_blocks: int, block_len: int) -> None:
        if num_blocks < 2:
            raise ConfigError(f"the KV cache has {num_blocks} blocks; it needs at least 2")
        self.num_blocks = num_blocks - 1
        self.block_len = block_len
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._readers = [0] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, without readers; oldest first
        self._drafted: set[int] = set()

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, including cached ones without readers."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reader."""
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        """Cached blocks without readers."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_len)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks; None, and no change, if fewer are available."""
        if count > self.num_available:
            return None
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._readers[block] = 1
            self._drafted.discard(block)
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give back blocks that were allocated or matched, each as often as it was taken."""
        for block in reversed(blocks):
            self._readers[block] -= 1
            if self._readers[block] == 0:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
            assert self._readers[block] >= 0, f"block {block} released too often"

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Take the cached blocks of the longest prefix of a chain of block hashes."""
        found = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            if self._readers[block] == 0:
                del self._idle[block]
            self._readers[block] += 1
            found.append(block)
        return found

    def cache_block(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Of two with equal contents the first stays cached."""
        if digest not in self._by_hash and block not in self._hash_of:
            self._by_hash[digest] = block
            self._hash_of[block] = digest

    def mark_drafted(self, blocks: Iterable[int]) -> None:
        """Note that the draft model's keys and values of these full blocks are written as well."""
        self._drafted.update(blocks)

    def num_drafted(self, blocks: Iterable[int]) -> int:
        """The number of leading ``blocks`` that hold the draft model's keys and values."""
        return sum(1 for _ in takewhile(self._drafted.__contains__, blocks))

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_hash[self._hash_of.pop(block)]
        return block


def hash_block(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block, given that of the block before it or, for the first, the salt."""
    return hashlib.blake2b(array("i", tokens).tobytes(), key=previous, digest_size=16).digest()


def salt_hash(salt: bytes) -> bytes:
    """The start of a chain of block hashes; chains of different salts never meet."""
    return hashlib.blake2b(salt, digest_size=16).digest()
