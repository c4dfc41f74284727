"""What a model family consists of: a config reader and a weight map. No forward pass."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from inferneo_jax.config import ModelConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.files import shown

Array = np.ndarray[Any, np.dtype[Any]]
HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that a checkpoint of the family must have, by its Hugging Face name and shape."""

    name: str
    shape: tuple[int, ...]


def stacked(*arrays: Array) -> Array:
    """The rows of several arrays, one after the other."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass(frozen=True)
class WeightMapping:
    """How one weight of the model is made from a checkpoint: which rows of which tensors it has.

    Attributes:
        tensors: the source tensors, which have equal rows.
        shape: of the weight. A kernel is a linear layer's ``[outputs, inputs]``, transposed: its
            first dimensions are the inputs, the others the outputs. In any other weight the first
            dimensions are the rows.
        arrange: takes an array ``[rows, ...]`` for each tensor and returns ``[rows, ...]`` with
            all their rows, in the order of the weight. It must not look at the numbers, so that
            applied to row numbers it tells where each row of the weight comes from.
        kernel: whether it is one.
    """

    tensors: tuple[SourceTensor, ...]
    shape: tuple[int, ...]
    arrange: Callable[..., Array] = stacked
    kernel: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: recorded in ``inferneo.json``.
        kind: which of the two forward passes runs it.
        architectures: supported values of ``architectures`` in a Hugging Face config.
        model_types: supported values of ``model_type``, used if a config has no architectures.
        read_config: converts a Hugging Face config; raises ConfigError for anything that the
            forward pass does not support.
        weight_map: maps the name of every weight of the model to its source tensors.
        ignored: regular expressions that match the whole names of source tensors that may stay
            unused; any other unused tensor is an error.
        prefixes: prefixes that source tensors' names may have.
    """

    name: str
    kind: Literal["decoder", "encoder"]
    architectures: frozenset[str]
    model_types: frozenset[str]
    read_config: Callable[[HFConfig], ModelConfig]
    weight_map: Callable[[Any], dict[str, WeightMapping]]
    ignored: Callable[[Any], tuple[str, ...]]
    prefixes: tuple[str, ...] = ("",)


def copied(name: str, *shape: int) -> WeightMapping:
    """A weight that is one source tensor, unchanged."""
    return WeightMapping((SourceTensor(name, shape),), shape)


def transposed(name: str, rows: int, columns: int, *into: int) -> WeightMapping:
    """A kernel: a linear layer's ``[out, in]`` tensor, transposed and reshaped to ``into``."""
    tensor = SourceTensor(name, (rows, columns))
    return WeightMapping((tensor,), into or (columns, rows), kernel=True)


def normed(name: str, source: str, width: int) -> dict[str, WeightMapping]:
    """Scale and bias of the layer normalisation ``name``, of the source tensors ``source``."""
    return {
        f"{name}.scale": copied(f"{source}.weight", width),
        f"{name}.bias": copied(f"{source}.bias", width),
    }


def integer(config: HFConfig, key: str, default: int | None = None) -> int:
    """Read a positive integer; null counts as absent.

    Raises:
        ConfigError: the value is anything else, or absent without a default.
    """
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"the model's config has no {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; it must be a positive integer"
        )
    return value


def number(config: HFConfig, key: str, default: float | None = None) -> float:
    """Read a positive number; null counts as absent.

    Raises:
        ConfigError: the value is anything else, or absent without a default.
    """
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"the model's config has no {key}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; it must be a number above 0"
        )
    return float(value)


def flag(config: HFConfig, key: str, default: bool) -> bool:
    """Read a boolean; null counts as absent.

    Raises:
        ConfigError: the value is anything else.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; it must be true or false"
        )
    return value


def table(config: HFConfig, key: str) -> HFConfig:
    """Read an object; empty if it is null or absent.

    Raises:
        ConfigError: the value is anything else.
    """
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {shown(value)} in the model's config; it must be an object")
    return value


def names(config: HFConfig, key: str) -> list[str]:
    """Read a list of strings; empty if it is null or absent.

    Raises:
        ConfigError: the value is anything else.
    """
    value = config.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} is {shown(value)} in the model's config; it must list names")
    return value


def expect(config: HFConfig, key: str, *allowed: Any) -> None:
    """Refuse unsupported values of a key.

    Raises:
        ConfigError: the value is not null, not absent and not one of ``allowed``.
    """
    value = config.get(key)
    if value is not None and value not in allowed:
        only = " or ".join(repr(a) for a in allowed) or "its absence"
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; only {only} is supported"
        )
