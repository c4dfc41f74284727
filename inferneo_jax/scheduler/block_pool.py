"""Who owns which page of the KV cache: free list, reference counts and the prefix index.

A full page is known by the hash of its tokens, of all tokens before it and of a salt. A page whose
last reader leaves stays known, as long as nobody needs its memory: the least recently used page is
taken first, and of one request's pages the deepest, since a prefix is of use without its tail but
not the other way round.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from inferneo_jax.errors import ConfigError

NO_PAGE = 0
"""Page 0 belongs to nobody: what padding writes goes there."""


class PagePool:
    """All pages of one cache. Not thread-safe: the engine's thread is its only user."""

    def __init__(self, num_pages: int, page_len: int) -> None:
        if num_pages < 2:
            raise ConfigError(f"the KV cache has {num_pages} pages; it needs at least 2")
        self.num_pages = num_pages - 1
        self.page_len = page_len
        self._free = list(range(num_pages - 1, NO_PAGE, -1))
        self._readers = [0] * num_pages
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, unread; oldest first

    @property
    def num_available(self) -> int:
        """Pages that can be had now, known ones without readers included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that somebody reads."""
        return self.num_pages - self.num_available

    @property
    def num_cached(self) -> int:
        """Pages without readers whose contents can still be found."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-num_tokens // self.page_len)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` pages, or None and no change when there are fewer."""
        if count > self.num_available:
            return None
        taken = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._readers[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Leave pages that were allocated or matched; each as often as it was taken."""
        for page in reversed(pages):
            self._readers[page] -= 1
            if self._readers[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
            assert self._readers[page] >= 0, f"page {page} released too often"

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Take the pages of the longest known prefix of a chain of page hashes."""
        found = []
        for digest in hashes:
            page = self._by_hash.get(digest)
            if page is None:
                break
            if self._readers[page] == 0:
                del self._idle[page]
            self._readers[page] += 1
            found.append(page)
        return found

    def cache_page(self, page: int, digest: bytes) -> None:
        """Make a full page findable. Of two pages with equal contents the first stays known."""
        if digest not in self._by_hash and page not in self._hash_of:
            self._by_hash[digest] = page
            self._hash_of[page] = digest

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_hash[self._hash_of.pop(page)]
        return page


def hash_page(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full page, given that of the page before it or, for the first, the salt."""
    return hashlib.blake2b(array("i", tokens).tobytes(), key=previous, digest_size=16).digest()


def salt_hash(salt: bytes) -> bytes:
    """The start of a chain of page hashes; chains of different salts never meet."""
    return hashlib.blake2b(salt, digest_size=16).digest()
