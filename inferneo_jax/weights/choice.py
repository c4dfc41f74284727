"""Chooses which of a repository's GGUF files to download."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from inferneo_jax.errors import FetchError
from inferneo_jax.weights.download import RemoteFile

_ROOM = 1.25  # of a file's size: what it takes in memory with the KV cache of one long conversation
_BEST_BY_DEFAULT = "Q8_0"
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d_[0-9A-Z]+(?:_[A-Z]+)?|TQ\d_\d|MXFP4(?:_MOE)?|BF16|F16|F32|FP16))"
    r"(?=$|[-._])",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
# Files beside a model: image encoders, importance matrices, draft heads.
_BESIDE = re.compile(r"(?:^|[-._/])(?:mmproj|imatrix|mtp)(?=[-._])", re.IGNORECASE)
_JOIN = "join them with `llama-gguf-split --merge` and use `inferneo convert FILE`"


@dataclass(frozen=True)
class Choice:
    """The chosen file, and why it was chosen; ``why`` is empty if it was asked for by name."""

    file: RemoteFile
    why: str = ""


def label_of(path: str) -> str | None:
    """The quantization that the name of a GGUF file states, such as ``Q4_K_M``, or None."""
    found = _LABEL.findall(path.removesuffix(".gguf"))
    return found[-1].upper() if found else None


def choose(files: Iterable[RemoteFile], wanted: str, free: int) -> Choice:
    """Choose a GGUF file.

    Args:
        files: all files of the repository.
        wanted: the name of a file or of a quantization; empty for the largest file that fits into
            memory with its KV cache, up to Q8_0.
        free: bytes of memory that are free.

    Raises:
        FetchError: there is no such file, or it is split; the message lists what there is.
    """
    models = [
        each
        for each in files
        if each.path.lower().endswith(".gguf") and not _BESIDE.search(each.path)
    ]
    if wanted.lower().endswith(".gguf"):
        found = [each for each in models if each.path == wanted]
        return Choice(_one(found, wanted, models))
    if wanted:
        found = [each for each in models if label_of(each.path) == wanted.upper()] or [
            each for each in models if label_of(each.path) == f"UD-{wanted.upper()}"
        ]
        return Choice(_one(found, wanted, models))
    return _largest_that_fits(models, free)


def _one(found: list[RemoteFile], wanted: str, models: list[RemoteFile]) -> RemoteFile:
    if not found:
        raise FetchError(f"it has no GGUF {wanted!r}; there are {_listed(models)}")
    whole = _whole(found)
    if not whole:
        raise FetchError(
            f"{wanted} is split into {len(found)} files, which are not read; choose another of "
            f"{_listed(_whole(models))}, or download the parts and {_JOIN}"
        )
    if len(whole) > 1:
        names = ", ".join(each.path for each in whole)
        raise FetchError(f"{wanted!r} is the quantization of several files; name one of {names}")
    return whole[0]


def _largest_that_fits(models: list[RemoteFile], free: int) -> Choice:
    whole = sorted(_whole(models), key=lambda each: each.size)
    if not whole:
        raise FetchError(
            f"its GGUF is split into {len(models)} files, which are not read; download the parts "
            f"and {_JOIN}"
        )
    eights = [each.size for each in whole if label_of(each.path) == _BEST_BY_DEFAULT]
    plain = {"F32", "F16", "FP16", "BF16"}
    allowed = [
        each
        for each in whole
        if (each.size <= min(eights) if eights else label_of(each.path) not in plain)
    ] or whole[:1]
    fitting = [each for each in allowed if each.size * _ROOM <= free]
    memory = f"the {free / 1e9:.1f} GB of free memory"
    if not fitting:
        return Choice(allowed[0], f"the smallest of {len(whole)}; it may not fit into {memory}")
    best = fitting[-1]
    if best is not allowed[-1]:
        return Choice(best, f"the largest of {len(whole)} that fits into {memory}")
    if len(whole) == 1:
        return Choice(best, "the only one")
    return Choice(best, f"the largest of {len(whole)} up to {_BEST_BY_DEFAULT}; fits into {memory}")


def _whole(models: list[RemoteFile]) -> list[RemoteFile]:
    return [each for each in models if not _SPLIT.search(each.path)]


def _listed(models: list[RemoteFile]) -> str:
    labels = [label_of(each.path) or each.path for each in sorted(models, key=lambda e: e.size)]
    return ", ".join(dict.fromkeys(labels)) or "none"
