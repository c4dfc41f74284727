"""Block formats: which outputs of a matrix are stored in which format of ggml."""

from typing import Any, NamedTuple

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class BlockPart(NamedTuple):
    """The outputs of a matrix that are stored in one format.

    The outputs of a matrix are the columns of ``x @ matrix``, and the rows of the tensors that it
    is made of. A matrix made of several tensors, such as qkv, may have several parts.

    Attributes:
        format: ggml's name in lower case, such as ``q4_k``.
        runs: first output and count of each run of outputs, in the order they are stored in.
    """

    format: str
    runs: tuple[tuple[int, int], ...]


class BlockRows(NamedTuple):
    """A part with its numbers, as a file has them.

    Attributes:
        part: what they are.
        tensors: each ``[rows, bytes of a row]``; together they are the outputs of the part, in the
            order of its runs.
    """

    part: BlockPart
    tensors: tuple[Bytes, ...]
