"""Texts in batches: each once, whole, and one behind the other."""

import numpy as np
import pytest

from inferneo_jax.scheduler.packing import Packer

LENGTHS = [(1,), (16,), (100,) * 32, (1,) * 700, tuple(range(1, 257, 5)), (2000, 3, 900)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(len(lengths)))
@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("padding_cost", [0.0, 1.0])
def test_every_text_is_packed_once(
    lengths: tuple[int, ...], dp_size: int, padding_cost: float
) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 1000, length).tolist() for length in lengths]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    packer = Packer(max(lengths), dp_size, padding_cost)
    seen = []
    while order:
        batch = packer.take(texts, order)
        assert batch.tokens.shape[1] in packer.sizes
        assert batch.cu_seqlens.shape == packer.empty(batch.tokens.shape[1]).cu_seqlens.shape
        assert (np.diff(batch.cu_seqlens) >= 0).all()
        for number, rank, place in batch.places:
            begin, end = batch.cu_seqlens[rank, place : place + 2]
            assert batch.tokens[rank, begin:end].tolist() == texts[number]
            seen.append(number)
        for rank, used in enumerate(batch.cu_seqlens[:, -1]):
            assert not batch.tokens[rank, used:].any()
    assert sorted(seen) == list(range(len(texts)))


def test_batches_pad_little_where_padding_costs() -> None:
    texts = [[7] * 100] * 32
    order = list(range(32))
    packer = Packer(256, 1, 1.0)
    sizes = []
    while order:
        sizes.append(packer.take(texts, order).tokens.size)
    assert sum(sizes) <= 1.2 * 3200
