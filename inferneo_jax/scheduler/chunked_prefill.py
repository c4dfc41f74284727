"""How prompts are cut into steps: a short, closed list of shapes, and which one a step takes.

A prefill step computes a rectangle, so many rows of so many prompt tokens, of which a part may be
padding. Each shape is a compiled program. None is larger than the longest chunk, which so bounds
what a step adds to the time that running streams wait: the token budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int]
"""Rows, and tokens of each row."""


@dataclass(frozen=True, slots=True)
class PrefillShapes:
    """The shapes of one data-parallel rank's prefill steps.

    Attributes:
        shapes: rising in tokens.
        overhead: what a step costs beside its tokens, in tokens: the time in which the weights are
            read, and what decoding rows wait meanwhile.
        padding: what a token of padding costs, in tokens of a prompt.
    """

    shapes: tuple[Shape, ...]
    overhead: int
    padding: float = 1.0

    @classmethod
    def of(
        cls, chunks: Sequence[int], slots: int, overhead: int, padding: float = 1.0
    ) -> "PrefillShapes":
        """Each chunk in one row, and in as many rows as the longest chunk's tokens allow."""
        rows = {chunk: max(1, min(slots, chunks[-1] // chunk)) for chunk in chunks}
        shapes = {(each, chunk) for chunk, most in rows.items() for each in (1, most)}
        rising = tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))
        return cls(rising, overhead, padding)

    @property
    def budget(self) -> int:
        """Most tokens of one step."""
        rows, chunk = self.shapes[-1]
        return rows * chunk

    @property
    def max_rows(self) -> int:
        """Most rows of one step."""
        return max(rows for rows, _ in self.shapes)

    def choose(self, lengths: Sequence[int]) -> Shape:
        """The shape that computes most prompt tokens for its cost.

        A prompt cut into chunks leaves its last one in part to padding. That is shared out over all
        of them, so that a cut is judged by where it leads. Of equals the one with longer rows: it
        ends some prompts sooner and none later.

        Args:
            lengths: prompt tokens that each sequence lacks, first come first; not empty.
        """

        def worth(shape: Shape) -> tuple[float, int]:
            rows, chunk = shape
            computed = sum(length / -(-length // chunk) for length in lengths[:rows])
            padded = rows * chunk - computed
            return computed / (self.overhead + computed + self.padding * padded), chunk

        return max(self.shapes, key=worth)
