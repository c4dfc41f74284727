"""The common form in which every reader returns a model, whatever its format."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inferneo_jax.errors import InferneoError
from inferneo_jax.weights.sources.tensor import FileTensor


def own_name(name: str) -> str:
    """The identity, as the name mapping of sources that already use Hugging Face names."""
    return name


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix errors with the model's path unless they already name it."""
    try:
        yield
    except InferneoError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model as returned by a reader.

    Attributes:
        path: the file or folder that was read.
        format: of the files with its tensors.
        config: the configuration with the keys of a Hugging Face ``config.json``. Settings that
            sentence-transformers keeps elsewhere are under the key ``sentence_transformers``.
        tensors: every tensor by the source's own name, none of them read yet.
        tensor_name: maps a Hugging Face tensor name to the source's own name.
        tokenizer_json: the tokenizer in the format of the ``tokenizers`` library.
        tokenizer_config: special tokens as plain strings, and ``chat_template`` (text or None).
        eos_token_ids: the ids that end a generation, in ascending order.
        bos_token_id: the id that starts a text, or None.
        licence: the licence as the source names it, or None.
        origin: what ``inferneo.json`` records about the origin of the weights.
    """

    path: Path
    format: Literal["gguf", "safetensors"]
    config: dict[str, Any]
    tensors: Mapping[str, FileTensor]
    tensor_name: Callable[[str], str] = own_name
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    licence: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)
