"""Packing of texts into batches of an encoder: one text after the other, in a few sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
Ids = Sequence[int]

_BATCH_TOKENS = 1024
"""Tokens of a full batch: enough for a matrix product to run at full speed."""

_LEAST_TOKENS = 16
"""Tokens of the smallest batch, and the fixed cost of a batch, in tokens."""

_MEAN_LENGTH = 8
"""Tokens per text for which a batch has room for texts; shorter texts leave some padding."""


class Batch(NamedTuple):
    """Packed texts, as an encoder takes them.

    Attributes:
        tokens: ``[dp_size, size]``: ids of one text after the other, then zeros.
        cu_seqlens: ``[dp_size, segments + 1]``: where each text begins, and the last one ends.
        places: for each text its number, its rank, and its place among the texts of that rank.
    """

    tokens: Ints
    cu_seqlens: Ints
    places: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Packer:
    """Cuts lists of texts into batches.

    Attributes:
        max_tokens: of one text.
        dp_size: number of data-parallel ranks, which have texts of their own in every batch.
        padding_cost: cost of a token of padding, in tokens of a text.
    """

    max_tokens: int
    dp_size: int
    padding_cost: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a batch in tokens, rising; fewer of them where padding costs little."""
        factor = 4 if self.padding_cost < 0.5 else 2
        sizes = [_LEAST_TOKENS]
        while sizes[-1] < max(_BATCH_TOKENS, self.max_tokens):
            sizes.append(factor * sizes[-1])
        return tuple(sizes)

    def empty(self, size: int) -> Batch:
        """A batch without texts."""
        texts = max(1, size // _MEAN_LENGTH)
        return Batch(
            np.zeros((self.dp_size, size), np.int32),
            np.zeros((self.dp_size, texts + 1), np.int32),
            [],
        )

    def take(self, texts: Sequence[Ids], order: list[int]) -> Batch:
        """Pack texts taken off the end of ``order``, which has the longest last.

        The batch gets the size that computes most for its cost.
        """

        def worth(size: int) -> float:
            used = sum(len(texts[i]) for i in _fitting(texts, order, size))
            return used / (_LEAST_TOKENS + used + self.padding_cost * (size - used))

        size = max(self.sizes, key=worth)
        batch = self.empty(size)
        for rank in range(self.dp_size):
            taken = _fitting(texts, order, size)
            del order[len(order) - len(taken) :]
            ends = list(accumulate((len(texts[i]) for i in taken), initial=0))
            batch.cu_seqlens[rank] = ends[-1]
            batch.cu_seqlens[rank, : len(ends)] = ends
            batch.tokens[rank, : ends[-1]] = [token for i in taken for token in texts[i]]
            batch.places.extend((i, rank, place) for place, i in enumerate(taken))
        return batch


def _fitting(texts: Sequence[Ids], order: Sequence[int], size: int) -> list[int]:
    """The longest remaining texts, as many as a rank's batch of this size holds."""
    longest = order[: -max(1, size // _MEAN_LENGTH) - 1 : -1]
    ends = accumulate(len(texts[i]) for i in longest)
    return [i for i, end in zip(longest, ends, strict=True) if end <= size]
