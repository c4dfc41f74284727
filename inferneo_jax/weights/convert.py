"""Converts a model in another format into a checkpoint of this package."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferneo_jax.config import ModelConfig
from inferneo_jax.errors import CheckpointError, TokenizerError
from inferneo_jax.models.families import Family, find_family
from inferneo_jax.models.families.family import WeightMapping
from inferneo_jax.platform.atomic import refuse_existing
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.weights.checkpoint import compare_shapes, write_checkpoint
from inferneo_jax.weights.sources.source import SourceModel, naming
from inferneo_jax.weights.sources.tensor import Array
from inferneo_jax.weights.sources.weight import SourceWeight


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
    """A model in another format. Everything but the values of its tensors has been checked."""

    source: SourceModel
    family: Family
    config: ModelConfig
    weights: Mapping[str, SourceWeight]


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
    tensors = source.tensors
    weights = {
        name: SourceWeight(mapping, tuple(tensors[names[t.name]] for t in mapping.tensors))
        for name, mapping in weight_map.items()
    }
    return ConvertibleModel(source, family, config, weights)


def convert(
    path: Path,
    destination: Path,
    progress: Progress = silent,
    *,
    licence: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Convert the model at ``path`` into a checkpoint folder at ``destination``.

    The folder is created completely or not at all. Arrays keep the dtype of the source;
    block-quantized ones become float32.

    Args:
        path: a GGUF file, or a folder in Hugging Face's layout.
        destination: the folder to create; it must not exist.
        progress: called after each weight.
        licence: overrides that of the source.
        origin: further entries of ``source`` in ``inferneo.json``.

    Returns:
        ``destination``.

    Raises:
        CheckpointError: the source cannot be read, or ``destination`` exists.
        ConfigError: the model is not supported.
        WeightsError: lists the source tensors that are missing, unused or misshapen.
    """
    path, destination = Path(path), Path(destination)
    refuse_existing(destination)
    model = read_model(path)
    weights: dict[str, Array] = {}
    progress("converting", 0, len(model.weights))
    for done, (name, weight) in enumerate(model.weights.items(), 1):
        weights[name] = weight[...]
        progress("converting", done, len(model.weights))
    source = model.source
    progress("writing", 0, 0)
    write_checkpoint(
        destination,
        kind=model.family.kind,
        family=model.family.name,
        config=model.config,
        weights=weights,
        tokenizer_json=source.tokenizer_json,
        tokenizer_config=source.tokenizer_config,
        eos_token_ids=source.eos_token_ids,
        bos_token_id=source.bos_token_id,
        licence=licence or source.licence,
        source={**source.origin, **(origin or {})},
    )
    return destination


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
