"""The common form in which every reader hands over a model of someone else's format."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from inferneo_jax.errors import InferneoError

Array = np.ndarray[Any, np.dtype[Any]]


def own_name(name: str) -> str:
    """The name mapping of sources that already use Hugging Face names."""
    return name


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the model's path before errors that do not name it."""
    try:
        yield
    except InferneoError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a source: its shape is known, its values are read by ``read()``.

    ``shape`` is in NumPy order (rows first); ``read`` returns float32, float16 or bfloat16 (through
    ml_dtypes) and raises CheckpointError when the values cannot be had.
    """

    shape: tuple[int, ...]
    read: Callable[[], Array]


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model as a reader found it.

    Attributes:
        path: the file or folder that was read.
        config: the configuration in the words of a Hugging Face ``config.json``. What
            sentence-transformers keeps elsewhere stands under the key ``sentence_transformers``.
        tensors: every tensor under the source's own name, none of them read yet.
        tensor_name: from a Hugging Face tensor name to the source's own one.
        tokenizer_json: the tokenizer in the format of the ``tokenizers`` library.
        tokenizer_config: special tokens as plain strings, and ``chat_template`` (text or None).
        eos_token_ids: ids that end a generation, rising.
        bos_token_id: the id that starts a text, if there is one.
        licence: as the source names it.
        origin: what ``inferneo.json`` remembers of where the weights came from.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    tensor_name: Callable[[str], str] = own_name
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    licence: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
