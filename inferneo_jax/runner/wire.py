"""Programs and their arguments as bytes: what a step's announcement holds."""

import struct
from typing import Any

import jax
import numpy as np

from inferneo_jax.errors import JobError
from inferneo_jax.runner.programs import Called, Programs

_NUMBER = struct.Struct("!H")


class Wire:
    """Writes and reads the steps of one model's programs.

    A step is the number of its program, and the bytes of its arrays one after the other. Kinds,
    shapes and order of the arrays are the program's own: both sides have them, none is sent.
    """

    def __init__(self, programs: Programs) -> None:
        self._keys = programs.keys()
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._empty = [programs.host_arguments(key) for key in self._keys]

    def write(self, key: Called, arguments: Any) -> list[bytes | memoryview]:
        """The parts of an announcement."""
        arrays = [np.ascontiguousarray(each) for each in jax.tree.leaves(arguments)]
        return [_NUMBER.pack(self._numbers[key]), *(array.data.cast("B") for array in arrays)]

    def read(self, payload: bytes) -> tuple[Called, Any]:
        """Program and arguments, as numpy arrays.

        Raises:
            JobError: it is no step of these programs.
        """
        (number,) = _NUMBER.unpack_from(payload)
        if number >= len(self._keys):
            raise JobError(f"the leader runs program {number}; there are {len(self._keys)}")
        empty, structure = jax.tree.flatten(self._empty[number])
        if len(payload) != (size := _NUMBER.size + sum(array.nbytes for array in empty)):
            raise JobError(f"a step has {len(payload)} bytes and its program takes {size}")
        arrays, start = [], _NUMBER.size
        for array in empty:
            flat = np.frombuffer(payload, array.dtype, array.size, start)
            arrays.append(flat.reshape(array.shape))
            start += array.nbytes
        return self._keys[number], jax.tree.unflatten(structure, arrays)
