"""Memory of weights, in huge pages, and of the KV cache, in small ones."""

import errno
import gc
import mmap
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.platform import huge_pages


@pytest.mark.parametrize("has_huge_pages", [True, False])
def test_what_several_threads_take_is_aligned_and_apart(
    has_huge_pages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_HUGE_PAGES", has_huge_pages and huge_pages._HUGE_PAGES)
    monkeypatch.setattr(huge_pages, "_REGION", 1 << 16)
    regions = huge_pages._Regions()
    sizes = [1, 63, 64, 65, 5000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3_000_000] * 20
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(regions.take, sizes))
    for number, part in enumerate(parts):
        part[:] = number % 251
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert part.shape == (size,)
        assert part.ctypes.data % huge_pages.ALIGNMENT == 0
        assert (part == number % 251).all()


def test_a_region_is_given_back_with_its_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = []

    def keep(size: int) -> np.ndarray:
        room = np.empty(size, np.uint8)
        mapped.append(weakref.ref(room))
        return room[:]

    monkeypatch.setattr(huge_pages, "_map", keep)
    monkeypatch.setattr(huge_pages, "_REGION", 100)
    regions = huge_pages._Regions()
    parts = [regions.take(size) for size in (30, 30, 90)]
    assert len(mapped) == 2
    del parts[0]
    gc.collect()
    assert mapped[0]() is not None
    del parts[0]
    gc.collect()
    assert mapped[0]() is None
    assert mapped[1]() is not None


@pytest.mark.skipif(not huge_pages._HUGE_PAGES, reason="this system has none")
def test_without_them_there_is_memory_and_without_memory_a_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "no huge pages")

    monkeypatch.setattr(mmap, "mmap", Refused)
    assert huge_pages._map(100).shape == (100,)
    with pytest.raises(MemoryError, match="cannot be mapped"):
        huge_pages._map(1 << 60)


def test_what_is_as_large_as_a_region_is_given_back_at_once() -> None:
    regions = huge_pages._Regions()
    part = regions.take(huge_pages._REGION)
    assert regions._region.size == 0
    assert part.shape == (huge_pages._REGION,)


def _flags(address: int) -> list[str]:
    """The flags of the mapping that an address of this process lies in."""
    mappings = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    for mapping in filter(None, mappings):
        start, end = (int(each, 16) for each in mapping.split()[0].split("-"))
        if start <= address < end:
            return mapping.rpartition("VmFlags:")[2].split()
    raise AssertionError("the address is not mapped")


@pytest.mark.skipif(not huge_pages._HUGE_PAGES, reason="the system has no huge pages")
def test_a_cache_comes_in_small_pages_whatever_its_size() -> None:
    for size in (0, 1, 5000, 3 << 22):
        array = jnp.full(size, 3.0)
        huge_pages.use_small_pages(array)
        assert (np.asarray(array) == 3.0).all()
    flags = _flags(array.unsafe_buffer_pointer() + array.nbytes // 2)
    assert "nh" in flags
    assert "hg" not in flags
