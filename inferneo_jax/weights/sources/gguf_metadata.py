"""The metadata of a GGUF file by type: a key may hold any value, whatever it should hold."""

import math
from collections.abc import Mapping
from typing import Any

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import shown


class Metadata:
    """Reads keys as the type that they must have.

    Every method returns its default where the key is absent.

    Args:
        values: the keys as ``read_header`` found them.
        error: what to raise, with the key, its value and what it must be.
    """

    def __init__(self, values: Mapping[str, Any], error: type[CheckpointError]) -> None:
        self._values = values
        self._error = error

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def require(self, key: str) -> None:
        """Raises the error unless the key is there."""
        if key not in self:
            raise self._error(f"the GGUF metadata has no {key}; take another file of the model")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 0, most: int = 2**63
    ) -> int | None:
        """A whole number within its bounds."""
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value = self._values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; old files have numbers."""
        value = self._values.get(key, default)
        if not isinstance(value, bool | int):
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        value = self._values.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts that must be there."""
        return self._list(key, str, "texts")

    def numbers(self, key: str) -> list[float]:
        """A list of numbers that must be there, none of them NaN."""
        found: list[float] = self._list(key, int | float, "numbers")
        if any(math.isnan(value) for value in found):
            raise self._error(f"{key} holds NaN; every value must be a number")
        return found

    def _list(self, key: str, kind: Any, what: str) -> list[Any]:
        self.require(key)
        value = self._values[key]
        # All items of an array in a file have the same type; but not those of another mapping.
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, value, f"a list of {what}")
        return value

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return self._error(f"{key} is {shown(value)}; it must be {wanted}")
