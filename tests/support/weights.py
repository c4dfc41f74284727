"""Weights that are arrays, as the loader takes them, and checkpoints of weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from inferneo_jax.weights.checkpoint import WEIGHTS_FOLDER, new_checkpoint
from inferneo_jax.weights.orbax import write_arrays


@dataclass(frozen=True)
class ArrayWeight:
    """A weight in memory, for what reads those on disk."""

    array: np.ndarray
    parts: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return self.array.shape

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """A slice."""
        return self.array[index]

    def blocks(self) -> None:
        """None: it is not stored in blocks."""


def joined(mapping, *arrays):
    """A weight, from the whole arrays of its tensors."""
    common = {array.dtype for array in arrays}
    dtype = common.pop() if len(common) == 1 else np.float32
    rows = mapping.arrange(*(array.astype(dtype) for array in arrays))
    return (rows.T if mapping.kernel else rows).reshape(mapping.shape)


def write_arrays_checkpoint(path, config, weights, **entries):
    """A checkpoint of a Llama whose weights are these arrays, by name."""
    needed = {"eos_token_ids": (), "bos_token_id": None, "tokenizer_json": "{}"}
    with new_checkpoint(
        Path(path),
        kind="decoder",
        family="llama",
        config=config,
        format="orbax",
        tokenizer_config={"chat_template": None},
        **(needed | entries),
    ) as folder:
        write_arrays(folder / WEIGHTS_FOLDER, weights.items())
    return path
