"""What a model family is: a config reader and a map of weight names. No forward passes."""

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
class Part:
    """One source tensor: its Hugging Face name, and the shape that it must have there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one of our weights is made: ``join`` takes the parts' arrays in order."""

    parts: tuple[Part, ...]
    join: Callable[..., Array]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: as it stands in ``inferneo.json``.
        kind: which of the two forward passes runs it.
        architectures: values of ``architectures`` in a Hugging Face config that it serves.
        model_types: values of ``model_type``, looked at when there are no architectures.
        read_config: raises ConfigError for what the forward pass does not do.
        recipes: for each weight of the model, how it is made. The weights of a config are exactly
            the keys.
        ignored: patterns (regular expressions on whole names) of source tensors that need not be
            used; any other unused tensor is an error.
        prefixes: what may stand before the names of the recipes.
    """

    name: str
    kind: Literal["decoder", "encoder"]
    architectures: frozenset[str]
    model_types: frozenset[str]
    read_config: Callable[[HFConfig], ModelConfig]
    recipes: Callable[[Any], dict[str, Recipe]]
    ignored: Callable[[Any], tuple[str, ...]]
    prefixes: tuple[str, ...] = ("",)


def copied(name: str, *shape: int) -> Recipe:
    """A weight that is a source tensor as it stands."""
    return Recipe((Part(name, shape),), lambda array: array)


def transposed(name: str, rows: int, columns: int, *into: int) -> Recipe:
    """A kernel made from a linear layer's ``[out, in]`` tensor, then reshaped to ``into``."""
    shape = into or (columns, rows)
    return Recipe((Part(name, (rows, columns)),), lambda array: array.T.reshape(shape))


def integer(config: HFConfig, key: str, default: int | None = None) -> int:
    """A positive whole number of the config; null counts as absent."""
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
    """A positive number of the config; null counts as absent."""
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
    """A truth value of the config; null counts as absent."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; it must be true or false"
        )
    return value


def table(config: HFConfig, key: str) -> HFConfig:
    """An object of the config; empty where it is null or absent."""
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {shown(value)} in the model's config; it must be an object")
    return value


def names(config: HFConfig, key: str) -> list[str]:
    """A list of texts of the config; empty where it is null or absent."""
    value = config.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} is {shown(value)} in the model's config; it must list names")
    return value


def expect(config: HFConfig, key: str, *allowed: Any) -> None:
    """Raises ConfigError unless the key is absent, null or one of the allowed values."""
    value = config.get(key)
    if value is not None and value not in allowed:
        only = " or ".join(repr(a) for a in allowed) or "its absence"
        raise ConfigError(
            f"{key} is {shown(value)} in the model's config; only {only} is supported"
        )
