"""Converts a model in another format into a checkpoint of this package."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inferneo_jax.config import ModelConfig
from inferneo_jax.errors import CheckpointError, TokenizerError
from inferneo_jax.models.families import Family, find_family
from inferneo_jax.models.families.family import WeightMapping
from inferneo_jax.platform.atomic import refuse_existing, remove_folder
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.weights.checkpoint import (
    INFO_FILE,
    WEIGHTS_FOLDER,
    WeightsFormat,
    new_checkpoint,
)
from inferneo_jax.weights.orbax import write_arrays
from inferneo_jax.weights.quantize import quantized, target_formats
from inferneo_jax.weights.shapes import compare_shapes
from inferneo_jax.weights.sources.source import SourceModel, naming
from inferneo_jax.weights.sources.tensor import Array, FileTensor
from inferneo_jax.weights.sources.weight import SourceWeight
from inferneo_jax.weights.table import checked, is_made_of, relative, write_formats, write_table

_DESCRIBED = ".inferneo"
_COPIED_BYTES = 2**24
_READ = ("*.json", "*/*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""The files of a folder in Hugging Face's layout that a model may be read from."""


def read_source(path: Path) -> SourceModel:
    """Open the model at ``path``: a GGUF file, or a folder in Hugging Face's layout.

    Raises:
        CheckpointError: it is neither, or cannot be read.
    """
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            names = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path} holds GGUF files; name one of them: {names}")
        from inferneo_jax.weights.sources.huggingface import read_huggingface

        return read_huggingface(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    if path.suffix.lower() == ".gguf":
        from inferneo_jax.weights.sources.gguf import read_gguf

        return read_gguf(path)
    raise CheckpointError(
        f"{path} is neither a GGUF file nor a folder with config.json and safetensors"
    )


@dataclass(frozen=True)
class ConvertibleModel:
    """A model in another format. Everything but the values of its tensors has been checked.

    Attributes:
        source: as its reader returns it.
        family: of the model.
        config: of the model.
        weights: by their names in the model.
        tensors: those that the weights are made of, by their Hugging Face names.
    """

    source: SourceModel
    family: Family
    config: ModelConfig
    weights: Mapping[str, SourceWeight]
    tensors: Mapping[str, FileTensor]

    @property
    def files(self) -> list[Path]:
        """The files that the weights are in."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_model(path: Path) -> ConvertibleModel:
    """Open and check the model at ``path``; raises like ``convert``, naming the path."""
    with naming(path):
        source = read_source(path)
        family = find_family(source.config)
        config = family.read_config(source.config)
        _check_tokenizer(source, config.vocab_size)
        weight_map = family.weight_map(config)
        names = _resolve(source, family, weight_map)
        _check(source, family.ignored(config), weight_map, names)
    tensors = {name: source.tensors[own] for name, own in names.items()}
    weights = {
        name: SourceWeight(mapping, tuple(tensors[each.name] for each in mapping.tensors))
        for name, mapping in weight_map.items()
    }
    return ConvertibleModel(source, family, config, weights, tensors)


def convert(
    path: Path,
    destination: Path,
    progress: Progress = silent,
    *,
    licence: str | None = None,
    origin: Mapping[str, Any] | None = None,
    quantization: str | None = None,
) -> Path:
    """Make a checkpoint of the model at ``path``, with the files of its weights as they are.

    The files are linked into the checkpoint, or copied if they are on another disk. So the
    checkpoint has all that it needs, and takes no more disk than the files. With a quantization it
    is an Orbax checkpoint instead; tensors are quantized one by one.

    Args:
        path: a GGUF file, or a folder in Hugging Face's layout.
        destination: the folder to create; it must not exist.
        progress: called as each stage advances.
        quantization: one of ``QUANTIZATIONS``.
        licence: overrides that of the source.
        origin: further entries of ``source`` in ``inferneo.json``.

    Returns:
        ``destination``, created completely or not at all.

    Raises:
        CheckpointError: the source cannot be read, or ``destination`` exists.
        ConfigError: the model is not supported, or cannot be quantized so.
        WeightsError: lists the source tensors that are missing, unused or misshapen.
    """
    path, destination = Path(path), Path(destination)
    refuse_existing(destination)
    model = read_model(path)
    if quantization:
        formats = target_formats(model.weights, model.config, quantization)
        with _new_checkpoint(destination, model, licence, origin, "orbax") as folder:
            _write_quantized(folder, model, formats, progress)
        return destination
    with _new_checkpoint(destination, model, licence, origin) as folder:
        names = {file: _own_name(model, file) for file in model.files}
        _bring(folder, names, progress)
        tensors = {
            name: replace(tensor, file=folder / names[tensor.file])
            for name, tensor in model.tensors.items()
        }
        found = checked(tensors, progress)
        write_table(folder, relative(found, folder), None)
    return destination


def describe(path: Path, checkpoints: Path, progress: Progress = silent) -> Path:
    """A checkpoint whose weights stay in the files at ``path``, made unless it is there already.

    It is a small folder beside ``path``, of the same name and ``.inferneo``; or one in
    ``checkpoints``, if nothing can be written beside ``path``. If the files have been replaced
    since, it is made again.

    Args:
        path: a GGUF file, a folder in Hugging Face's layout, or a checkpoint, which is returned.
        checkpoints: the folder of all checkpoints.
        progress: called as each stage advances.

    Raises:
        CheckpointError: the source cannot be read, or the folder cannot be written anywhere.
        ConfigError: the model is not supported.
        WeightsError: lists the source tensors that are missing, unused or misshapen.
    """
    path = path.absolute()
    if (path / INFO_FILE).exists():
        return path
    made_of = _made_of(path)
    beside = path.with_name(f"{path.name}{_DESCRIBED}")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    elsewhere = checkpoints / f"{path.stem if path.is_file() else path.name}-{digest}"
    for folder in (beside, elsewhere):
        if is_made_of(folder, made_of):
            return folder
    folder = beside if os.access(path.parent, os.W_OK) else elsewhere
    model = read_model(path)
    if (folder / INFO_FILE).exists():
        remove_folder(folder)
    try:
        with _new_checkpoint(folder, model) as partial:
            write_table(partial, relative(checked(model.tensors, progress), folder), made_of)
    except CheckpointError:
        if not is_made_of(folder, made_of):  # another process has made it meanwhile
            raise
    return folder


def _new_checkpoint(
    destination: Path,
    model: ConvertibleModel,
    licence: str | None = None,
    origin: Mapping[str, Any] | None = None,
    format: WeightsFormat | None = None,
) -> AbstractContextManager[Path]:
    source = model.source
    return new_checkpoint(
        destination,
        kind=model.family.kind,
        family=model.family.name,
        config=model.config,
        format=format or source.format,
        tokenizer_json=source.tokenizer_json,
        tokenizer_config=source.tokenizer_config,
        eos_token_ids=source.eos_token_ids,
        bos_token_id=source.bos_token_id,
        licence=licence or source.licence,
        source={**source.origin, **(origin or {})},
    )


def _write_quantized(
    folder: Path, model: ConvertibleModel, formats: Mapping[str, str], progress: Progress
) -> None:
    """Write the Orbax checkpoint of a quantized model, tensor by tensor."""
    total = sum(tensor.size for tensor in model.tensors.values())

    def arrays() -> Iterator[tuple[str, Array]]:
        begin = 0
        for name, tensor in model.tensors.items():

            def each(rows: int, begin: int = begin, tensor: FileTensor = tensor) -> None:
                progress("quantizing", begin + tensor.size * rows // tensor.shape[0], total)

            yield name, quantized(tensor, formats[name], each)
            begin += tensor.size

    progress("quantizing", 0, total)
    write_arrays(folder / WEIGHTS_FOLDER, arrays())
    write_formats(
        folder, {name: (formats[name], tensor.shape) for name, tensor in model.tensors.items()}
    )


def _own_name(model: ConvertibleModel, file: Path) -> str:
    return "model.gguf" if model.source.format == "gguf" else file.name


def _bring(folder: Path, names: Mapping[Path, str], progress: Progress) -> None:
    """Link files into a folder, or copy those on another disk or of another owner."""
    total = sum(file.stat().st_size for file in names)
    done = 0
    for file, name in names.items():
        try:
            os.link(file.resolve(), folder / name)
            continue
        except OSError:  # of many kinds, and copying says what is really wrong
            pass
        with file.open("rb") as source, (folder / name).open("xb") as copy:
            while count := os.sendfile(copy.fileno(), source.fileno(), None, _COPIED_BYTES):
                done += count
                progress("copying", done, total)


def _made_of(path: Path) -> dict[str, list[int]]:
    """Sizes and times of all files that a model is read from, by their paths."""
    files = [path]
    if path.is_dir():
        files = [f for pattern in _READ for f in path.glob(pattern) if f.is_file()]
    found = {}
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            found[str(file)] = [status.st_size, status.st_mtime_ns]
    return found


def _check_tokenizer(source: SourceModel, vocab_size: int) -> None:
    """Check that the tokenizer loads and that its ids are within the model's vocabulary."""
    # Not at the top: the tokenizers library takes its time, and only conversion needs it.
    from inferneo_jax.text.tokenizer import Tokenizer

    # Chat templates are compiled by a process of their own, when the model is loaded.
    config = {**source.tokenizer_config, "chat_template": None}
    tokenizer = Tokenizer.from_text(source.tokenizer_json, config)
    ids = {*source.eos_token_ids, source.bos_token_id, *tokenizer.eos_token_ids} - {None}
    if beyond := [index for index in ids if index is not None and index >= vocab_size]:
        raise TokenizerError(
            f"a text begins or ends with the token {max(beyond)}; the model has {vocab_size}"
        )


def _resolve(
    source: SourceModel, family: Family, weight_map: Mapping[str, WeightMapping]
) -> dict[str, str]:
    """Map the names in ``weight_map`` to the source's, with the prefix that matches most."""
    wanted = [tensor.name for mapping in weight_map.values() for tensor in mapping.tensors]
    candidates = [
        {name: source.tensor_name(prefix + name) for name in wanted} for prefix in family.prefixes
    ]
    return max(candidates, key=lambda names: len(source.tensors.keys() & set(names.values())))


def _check(
    source: SourceModel,
    ignored: tuple[str, ...],
    weight_map: Mapping[str, WeightMapping],
    names: Mapping[str, str],
) -> None:
    """Check that each tensor exists, has its shape, and is used or ignored."""
    wanted = {names[p.name]: p.shape for mapping in weight_map.values() for p in mapping.tensors}
    skip = re.compile("|".join(ignored) or r"(?!)")
    unused = [n for n in source.tensors if n not in wanted and not skip.fullmatch(n)]
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    compare_shapes(shapes, wanted, str(source.path), unused)
    for name in wanted:
        source.tensors[name].check_format()
