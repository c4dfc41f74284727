"""Pads a model's sizes to multiples of a mesh's axes, and its weights accordingly.

Sizes that are not divisible by the number of parts are padded with zeros, which change no result:
the output weights of a padded query head are zero, a padded feature is multiplied by zero, and
padded vocabulary entries are removed from the logits. If there are more parts than KV heads,
several parts hold each KV head and divide its group of query heads among them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from inferneo_jax.config import DecoderConfig, ModelConfig

Index = tuple[slice, ...]


class Sliceable(Protocol):
    """A whole weight of which slices can be read, such as a numpy array or a file."""

    def __getitem__(self, index: Index, /) -> Any:
        """Read a slice as a numpy array."""


Config = TypeVar("Config", bound=ModelConfig)


def pad_for_mesh(config: Config, parts: int) -> Config:
    """The configuration of the padded model, which splits into ``parts`` equal parts."""
    padded: dict[str, Any] = {
        name: _round_up(getattr(config, name), parts) for name in ("vocab_size", "mlp_size")
    }
    if isinstance(config, DecoderConfig):
        group = -(-config.group_size // max(1, parts // config.num_kv_heads))
        copies = -(-config.group_size // group)
        padded["num_kv_heads"] = _round_up(config.num_kv_heads * copies, parts)
        padded["num_heads"] = padded["num_kv_heads"] * group
    else:
        padded["num_heads"] = _round_up(config.num_heads, parts)
    return dataclasses.replace(config, **padded)


@dataclass(frozen=True)
class PaddedWeight:
    """A weight with the shape that the padded model declares, read from the original weight.

    Attributes:
        source: the original weight.
        stored: the shape of the original weight.
        shape: the shape of the padded weight.
        axes: the logical axes of both weights.
        group: the number of query heads per KV head in the original and in the padded model; None
            if the weight has no KV heads.
    """

    source: Sliceable
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    group: tuple[int, int] | None = None

    def __getitem__(self, index: Index, /) -> np.ndarray[Any, np.dtype[Any]]:
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        if self.shape == self.stored:
            return np.asarray(self.source[tuple(slice(*each) for each in bounds)])
        if "kv_heads" in self.axes:
            return self._heads(bounds)
        kept = [np.minimum(each, size) for each, size in zip(bounds, self.stored, strict=True)]
        read = np.asarray(self.source[tuple(slice(*each) for each in kept)])
        missing = [(0, b - a - n) for (a, b), n in zip(bounds, read.shape, strict=True)]
        return np.pad(read, missing)

    def _heads(self, bounds: list[tuple[int, int]]) -> np.ndarray[Any, np.dtype[Any]]:
        """Read KV heads: padded head j is a copy of head j // copies with a part of its group."""
        assert self.group
        dim = self.axes.index("kv_heads")
        group, padded_group = self.group
        copies = -(-group // padded_group)
        before = tuple(slice(*each) for each in bounds[:dim])
        after = tuple(slice(*each) for each in bounds[dim + 2 :])
        every = (slice(None),) * dim
        part: np.ndarray[Any, Any] = np.zeros([b - a for a, b in bounds], np.float32)
        for place, head in enumerate(range(*bounds[dim])):
            original, copy = divmod(head, copies)
            if original >= self.stored[dim]:
                continue
            whole = slice(original, original + 1)
            block = np.asarray(self.source[(*before, whole, slice(None), *after)])
            part = part.astype(block.dtype, copy=False)
            low, high = copy * padded_group, min((copy + 1) * padded_group, group)
            # The queries, followed by key and value if the weight combines them.
            for to, source in (
                (slice(high - low), slice(low, high)),
                (slice(padded_group, None), slice(group, None)),
            ):
                target: Any = (*every, place, to)
                part[target] = block[(*every, 0, source)]
        return part


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
