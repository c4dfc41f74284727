"""Typed access to the metadata of a GGUF file, in which a key may hold a value of any type."""

import math
from collections.abc import Mapping
from typing import Any

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import shown


class Metadata:
    """Reads the value of a key and checks that it has the required type.

    Every method that takes a default returns it when the key is absent.

    Args:
        values: the metadata as returned by ``read_header``.
        error: the exception to raise; its message names the key, its value and what is required.
    """

    def __init__(self, values: Mapping[str, Any], error: type[CheckpointError]) -> None:
        self._values = values
        self._error = error

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def require(self, key: str) -> None:
        """Raise the error unless the key is present."""
        if key not in self:
            raise self._error(f"the GGUF metadata has no {key}; take another file of the model")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**63
    ) -> int | None:
        """Read an integer from ``least`` to ``most``."""
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Read a finite number above 0."""
        value = self._values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean, which old files store as a number."""
        value = self._values.get(key, default)
        if not isinstance(value, bool | int):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        """Read a string."""
        value = self._values.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """Read a required list of strings."""
        return self._list(key, str, "texts")

    def numbers(self, key: str) -> list[float]:
        """Read a required list of numbers, none of which may be NaN."""
        found: list[float] = self._list(key, int | float, "numbers")
        if any(math.isnan(value) for value in found):
            raise self._error(f"{key} holds NaN; every value must be a number")
        return found

    def _list(self, key: str, kind: Any, what: str) -> list[Any]:
        self.require(key)
        value = self._values[key]
        # All items of an array in a file have the same type, but other mappings may mix types.
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, value, f"a list of {what}")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return self._error(f"{key} is {shown(value)}; it must be {wanted}")
