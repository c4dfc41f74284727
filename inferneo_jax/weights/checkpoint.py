"""The checkpoint folder of this package: written by the converter, read by everything else.

::

    inferneo.json           kind, family, configuration, origin, end-of-text ids
    tokenizer.json          in the format of the `tokenizers` library
    tokenizer_config.json   special tokens and chat template
    weights.json            the table of its tensors: in a GGUF file or in safetensors files, which
                            lie in the folder too, or anywhere else; or in
    weights/                an Orbax checkpoint of {tensor name: array}. Those of older versions
                            have no table and are {weight name: array}
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from inferneo_jax.config import MAX_VOCAB_SIZE, DecoderConfig, EncoderConfig, ModelConfig
from inferneo_jax.errors import CheckpointError, ConfigError
from inferneo_jax.files import read_object, shown
from inferneo_jax.platform.atomic import new_folder
from inferneo_jax.weights.orbax import array_shapes, open_arrays, open_tensors
from inferneo_jax.weights.shapes import compare_shapes
from inferneo_jax.weights.sources.tensor import StoredTensor
from inferneo_jax.weights.table import TABLE_FILE, read_formats, read_table

if TYPE_CHECKING:
    from inferneo_jax.weights.sources.weight import Weight

FORMAT = 1
INFO_FILE = "inferneo.json"
WEIGHTS_FOLDER = "weights"
_CONFIGS: dict[str, type[ModelConfig]] = {"decoder": DecoderConfig, "encoder": EncoderConfig}


WeightsFormat = Literal["orbax", "gguf", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The content of ``inferneo.json``, and the folder it was found in.

    ``created`` is the time of conversion in seconds since 1970; ``source`` says where the weights
    came from, for people to read. ``format`` is that of the weights.
    """

    path: Path
    format: WeightsFormat
    kind: Literal["decoder", "encoder"]
    family: str
    config: ModelConfig
    created: int
    licence: str | None
    source: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_info(path: Path) -> CheckpointInfo:
    """Read the description of the checkpoint in the folder ``path``.

    Raises:
        CheckpointError: there is none, or it is damaged or in an unknown format.
    """
    path = Path(path)
    file = path / INFO_FILE
    try:
        values = read_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} holds no converted model (no {INFO_FILE}); "
            "make one with `inferneo pull` or `inferneo convert`"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{error}; convert the model again") from error
    try:
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{file} has format {shown(values['format'])}; this version reads {FORMAT}: "
                "convert the model again"
            )
        # Checkpoints of older versions do not mention it.
        weights = values.get("weights", {"format": "orbax"})["format"]
        if weights not in get_args(WeightsFormat):
            raise ValueError(f"{shown(weights)} is no format of weights")
        config_class = _CONFIGS[values["kind"]]
        info = CheckpointInfo(
            path=path,
            format=weights,
            kind=values["kind"],
            family=_text(values["family"]),
            config=config_class.from_dict(values["config"]),
            created=_seconds(values["created"]),
            licence=None if values["licence"] is None else _text(values["licence"]),
            source=dict(values["source"]),
            eos_token_ids=tuple(sorted(_token_ids(values["eos_token_ids"]))),
            bos_token_id=min(_token_ids([values["bos_token_id"]]), default=None),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(
            f"{file} is not what this version writes ({type(error).__name__}: {error}); "
            "convert the model again"
        ) from error
    if weights == "orbax" and not (path / WEIGHTS_FOLDER).is_dir():
        raise CheckpointError(f"{path} has no {WEIGHTS_FOLDER} folder; convert the model again")
    return info


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not a text")
    return value


def _seconds(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{shown(value)} is not a time of conversion")
    return value


def _token_ids(values: list[Any]) -> set[int]:
    ids = {value for value in values if value is not None}
    if bad := [i for i in ids if type(i) is not int or not 0 <= i < MAX_VOCAB_SIZE]:
        raise ValueError(f"{shown(bad[0])} is not a token id")
    return ids


@contextlib.contextmanager
def new_checkpoint(
    destination: Path,
    *,
    kind: Literal["decoder", "encoder"],
    family: str,
    config: ModelConfig,
    format: WeightsFormat,
    tokenizer_json: str,
    tokenizer_config: Mapping[str, Any],
    eos_token_ids: Iterable[int],
    bos_token_id: int | None,
    licence: str | None = None,
    source: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Write a checkpoint folder, completely or not at all: all but the weights.

    Yields:
        The folder under another name, to which the weights must be added.

    Raises:
        CheckpointError: ``destination`` exists already, or cannot be written.
    """
    info = {
        "format": FORMAT,
        "kind": kind,
        "family": family,
        "config": config.to_dict(),
        "created": int(time.time()),
        "licence": licence,
        "weights": {"format": format},
        "source": dict(source or {}),
        "eos_token_ids": sorted(eos_token_ids),
        "bos_token_id": bos_token_id,
    }
    try:
        with new_folder(Path(destination).absolute()) as folder:
            _write_json(folder / INFO_FILE, info)
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            _write_json(folder / "tokenizer_config.json", tokenizer_config)
            yield folder
    except OSError as error:
        raise CheckpointError(
            f"{destination} could not be written ({error.strerror or error}); free some space "
            "there, or name another folder with --checkpoints or INFERNEO_CHECKPOINTS"
        ) from error


def open_weights(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> "dict[str, Weight]":
    """Open the weights of a checkpoint, to be read by slices or blocks.

    Every name and shape is compared before anything is read.

    Raises:
        WeightsError: names each missing, unused or misshapen weight.
        CheckpointError: the files are damaged or missing.
    """
    info = read_info(path)
    tensors = _tensors(info)
    if tensors is None:
        return {**open_arrays(_orbax(info), wanted)}
    # Not at the top: it brings in flax, and commands that list models do without.
    from inferneo_jax.models.families import FAMILIES
    from inferneo_jax.weights.sources.weight import SourceWeight

    families = [each for each in FAMILIES if each.name == info.family]
    if not families:
        raise CheckpointError(
            f"{path} is a model of the family {shown(info.family)}, which this version does not "
            "have; convert the model again"
        )
    mappings = families[0].weight_map(info.config)
    needed = {t.name: t.shape for mapping in mappings.values() for t in mapping.tensors}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    compare_shapes(shapes, needed, str(path))
    compare_shapes({name: m.shape for name, m in mappings.items()}, wanted, str(path))
    return {
        name: SourceWeight(mapping, tuple(tensors[each.name] for each in mapping.tensors))
        for name, mapping in mappings.items()
    }


def stored_shapes(info: CheckpointInfo) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is stored, weights or tensors, without reading any of them.

    Raises:
        CheckpointError: the description of the weights is damaged, or a file is missing.
    """
    tensors = _tensors(info)
    if tensors is None:
        return array_shapes(_orbax(info))
    return {name: tensor.shape for name, tensor in tensors.items()}


def _tensors(info: CheckpointInfo) -> Mapping[str, StoredTensor] | None:
    """The tensors of a checkpoint by name; None if it has weights instead."""
    if info.format != "orbax":
        return read_table(info.path)
    if (info.path / TABLE_FILE).exists():
        return open_tensors(_orbax(info), read_formats(info.path))
    return None


def _orbax(info: CheckpointInfo) -> Path:
    return info.path.absolute() / WEIGHTS_FOLDER


def fingerprint(info: CheckpointInfo) -> str:
    """A digest that tells whether two machines have the same model.

    It covers the configuration, the names and shapes of the weights, and their checksums; or, where
    there are none, in an Orbax checkpoint, all numbers of the vectors (normalisations, biases),
    which differ between any two trained models. Reading the matrices would take too long.

    Raises:
        CheckpointError: the files are damaged or missing.
    """
    known: list[Any] = [info.family, info.config.to_dict(), info.eos_token_ids]
    tensors = _tensors(info)
    if tensors is None:
        shapes = dict(sorted(stored_shapes(info).items()))
        weights = open_arrays(_orbax(info), shapes)
        vectors = [weights[name][:,] for name, shape in shapes.items() if len(shape) == 1]
        known += [shapes]
    else:
        found = [tensor for _, tensor in sorted(tensors.items())]
        known += [[each.name, each.format, each.shape, each.checksums] for each in found]
        unknown = [each for each in found if each.checksums is None and len(each.shape) == 1]
        vectors = [each.read() for each in unknown]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for vector in vectors:
        digest.update(vector.tobytes())
    return digest.hexdigest()[:16]


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
