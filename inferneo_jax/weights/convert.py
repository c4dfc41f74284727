"""From a model of someone else's format to a checkpoint of this package."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from inferneo_jax.errors import CheckpointError
from inferneo_jax.models.families import Family, find_family
from inferneo_jax.models.families.family import Recipe
from inferneo_jax.weights.atomic import refuse_existing
from inferneo_jax.weights.checkpoint import compare_shapes, write_checkpoint
from inferneo_jax.weights.source import Array, SourceModel

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done of it and its total; the total is 0 where it is unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def read_source(path: Path) -> SourceModel:
    """The model at ``path``: a GGUF file, or a folder in Hugging Face form.

    Raises:
        CheckpointError: it is neither, or cannot be read.
    """
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            names = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path} holds GGUF files; name one of them: {names}")
        from inferneo_jax.weights.huggingface import read_huggingface

        return read_huggingface(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    if path.suffix.lower() == ".gguf":
        from inferneo_jax.weights.gguf import read_gguf

        return read_gguf(path)
    raise CheckpointError(
        f"{path} is neither a GGUF file nor a folder with config.json and safetensors"
    )


def convert(
    path: Path,
    destination: Path,
    progress: Progress = silent,
    *,
    licence: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Converts the model at ``path`` into a checkpoint folder at ``destination``.

    The folder appears whole or not at all. Arrays keep the dtype they have in the source;
    block-quantized ones become float32.

    Args:
        path: a GGUF file, or a folder in Hugging Face form.
        destination: the folder to make; it must not exist.
        progress: told of each weight.
        licence: where the source does not name its own.
        origin: more for ``source`` in ``inferneo.json``.

    Returns:
        ``destination``.

    Raises:
        CheckpointError: the source cannot be read, or ``destination`` exists.
        ConfigError: the model is of a kind that is not supported.
        WeightsError: names each source tensor that is missing, unused or misshapen.
    """
    path, destination = Path(path), Path(destination)
    refuse_existing(destination)
    source = read_source(path)
    family = find_family(source.config)
    config = family.read_config(source.config)
    recipes = family.recipes(config)
    names = _resolve(source, family, recipes)
    _check(source, family.ignored(config), recipes, names)
    weights: dict[str, Array] = {}
    progress("converting", 0, len(recipes))
    for done, (name, recipe) in enumerate(recipes.items(), 1):
        arrays = [source.tensors[names[part.name]].read() for part in recipe.parts]
        weights[name] = recipe.join(*arrays)
        progress("converting", done, len(recipes))
    progress("writing", 0, 0)
    write_checkpoint(
        destination,
        kind=family.kind,
        family=family.name,
        config=config,
        weights=weights,
        tokenizer_json=source.tokenizer_json,
        tokenizer_config=source.tokenizer_config,
        eos_token_ids=source.eos_token_ids,
        bos_token_id=source.bos_token_id,
        licence=licence or source.licence,
        source={**source.origin, **(origin or {})},
    )
    return destination


def _resolve(source: SourceModel, family: Family, recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """From the names in the recipes to the source's own, under the prefix that finds the most."""
    parts = [part.name for recipe in recipes.values() for part in recipe.parts]
    candidates = [
        {part: source.tensor_name(prefix + part) for part in parts} for prefix in family.prefixes
    ]
    return max(candidates, key=lambda names: len(source.tensors.keys() & set(names.values())))


def _check(
    source: SourceModel,
    ignored: tuple[str, ...],
    recipes: Mapping[str, Recipe],
    names: Mapping[str, str],
) -> None:
    """Raises WeightsError unless each tensor is there, has its shape, and is used or ignored."""
    wanted = {names[p.name]: p.shape for recipe in recipes.values() for p in recipe.parts}
    skip = re.compile("|".join(ignored) or r"(?!)")
    unused = [n for n in source.tensors if n not in wanted and not skip.fullmatch(n)]
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    compare_shapes(shapes, wanted, str(source.path), unused)
