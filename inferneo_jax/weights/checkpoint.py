"""The checkpoint folder of this package: written by the converter, read by everything else.

::

    inferneo.json           kind, family, configuration, origin, end-of-text ids
    tokenizer.json          in the format of the `tokenizers` library
    tokenizer_config.json   special tokens and chat template
    weights/                an Orbax checkpoint of {weight name: array}
"""

import hashlib
import json
import logging
import operator
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import orjson

from inferneo_jax.config import MAX_VOCAB_SIZE, DecoderConfig, EncoderConfig, ModelConfig
from inferneo_jax.errors import CheckpointError, ConfigError, WeightsError
from inferneo_jax.files import read_object, shown
from inferneo_jax.platform.atomic import new_folder

FORMAT = 1
INFO_FILE = "inferneo.json"
WEIGHTS_FOLDER = "weights"
_DESCRIPTION = b"/zarr.json"
_CHUNK_BYTES = 2**24
_LISTED = 10
_PLAIN = re.compile(r"[\w.-]{1,100}", re.ASCII)
_CONFIGS: dict[str, type[ModelConfig]] = {"decoder": DecoderConfig, "encoder": EncoderConfig}


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The content of ``inferneo.json``, and the folder it was found in.

    ``created`` is the time of conversion in seconds since 1970; ``source`` says where the weights
    came from, for people to read.
    """

    path: Path
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
        config_class = _CONFIGS[values["kind"]]
        info = CheckpointInfo(
            path=path,
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
    if not (path / WEIGHTS_FOLDER).is_dir():
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


def write_checkpoint(
    destination: Path,
    *,
    kind: Literal["decoder", "encoder"],
    family: str,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
    tokenizer_json: str,
    tokenizer_config: Mapping[str, Any],
    eos_token_ids: Iterable[int],
    bos_token_id: int | None,
    licence: str | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder, completely or not at all. Arrays keep their dtype.

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
        "source": dict(source or {}),
        "eos_token_ids": sorted(eos_token_ids),
        "bos_token_id": bos_token_id,
    }
    try:
        with new_folder(Path(destination).absolute()) as folder:
            _write_json(folder / INFO_FILE, info)
            (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            _write_json(folder / "tokenizer_config.json", tokenizer_config)
            checkpointer = _checkpointer()
            # Its own temporary folder is renamed inside ours.
            checkpointer.save(folder / WEIGHTS_FOLDER, dict(weights), save_args=_chunked(weights))
    except OSError as error:
        raise CheckpointError(
            f"{destination} could not be written ({error.strerror or error}); free some space "
            "there, or name another folder with --checkpoints or INFERNEO_CHECKPOINTS"
        ) from error


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a checkpoint. Indexing it reads that slice from disk, and no more.

    Attributes:
        shape: of the whole weight.
    """

    shape: tuple[int, ...]
    _folder: Path
    _array: Any
    parts: ClassVar[None] = None

    def blocks(self) -> None:
        """None: no weight of an Orbax checkpoint is stored in blocks."""

    def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray[Any, np.dtype[Any]]:
        try:
            return np.asarray(self._array[index].read().result())
        except MemoryError:
            raise
        except Exception as error:  # damaged files come out of TensorStore as that
            raise _damaged(self._folder, error) from error


def open_weights(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, StoredWeight]:
    """Open the weights of a checkpoint, to be read by slices.

    Every name and shape is compared before any array is opened.

    Raises:
        WeightsError: names each missing, unused or misshapen weight.
        CheckpointError: the files are damaged or missing.
    """
    import tensorstore

    folder = Path(path).absolute() / WEIGHTS_FOLDER
    compare_shapes(stored_shapes(path), wanted, str(path))
    context = tensorstore.Context()  # the weights share one view of the folder
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {**_store(folder), "path": f"{name}/"},
            },
            open=True,
            read=True,
            context=context,
        )
        for name in wanted
    }
    try:
        return {
            name: StoredWeight(tuple(wanted[name]), folder, future.result())
            for name, future in opening.items()
        }
    except Exception as error:
        raise _damaged(folder, error) from error


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint, without reading any of them.

    Raises:
        CheckpointError: the weights' own description is damaged or missing.
    """
    import tensorstore

    # Not with Orbax, which takes half a second to import.
    folder = Path(path).absolute() / WEIGHTS_FOLDER
    try:
        store = tensorstore.KvStore.open(_store(folder)).result()
        keys = [key for key in store.list().result() if key.endswith(_DESCRIPTION)]
        described = [store.read(key) for key in keys]
        shapes = {
            key.removesuffix(_DESCRIPTION).decode(): tuple(
                map(operator.index, orjson.loads(each.result().value)["shape"])
            )
            for key, each in zip(keys, described, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(folder, error) from error
    if not shapes:
        raise _damaged(folder, "no description of them is left")
    return shapes


def compare_shapes(
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
    unused: Iterable[str] | None = None,
) -> None:
    """Compare the names and shapes of stored weights with those that a model needs.

    Args:
        stored: shapes of the stored weights by name.
        wanted: shapes of the model's weights by name.
        where: the file or folder, for the error.
        unused: stored names that must not be there; by default all that are not wanted.

    Raises:
        WeightsError: lists up to ten missing, unused and misshapen weights each.
    """
    misshapen = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    kinds = {
        "missing": wanted.keys() - stored.keys(),
        "unused": stored.keys() - wanted.keys() if unused is None else unused,
        "misshapen": misshapen,
    }
    problems = []
    for kind, names in kinds.items():
        if not (found := sorted(names)):
            continue
        listed = [_plain(name) for name in found[:_LISTED]]
        if kind == "misshapen":
            listed = [
                f"{text} is {shown(list(stored[name]))}, not {list(wanted[name])}"
                for text, name in zip(listed, found, strict=False)
            ]
        more = ", ..." if len(found) > _LISTED else ""
        problems.append(f"{len(found)} {kind} ({', '.join(listed)}{more})")
    if problems:
        raise WeightsError(f"the weights of {where} do not fit the model: {'; '.join(problems)}")


def _plain(name: str) -> str:
    """The name, quoted if it has unusual characters."""
    return name if _PLAIN.fullmatch(name) else shown(name)


def _store(folder: Path) -> dict[str, Any]:
    """TensorStore's specification of the files that hold all weights."""
    return {"driver": "ocdbt", "base": f"file://{folder}/"}


def fingerprint(info: CheckpointInfo) -> str:
    """A digest that tells whether two machines have the same model.

    It covers the configuration, the names and shapes of the weights, and all numbers of the vectors
    (normalisations, biases), which differ between any two trained models. Reading the matrices
    would take too long.

    Raises:
        CheckpointError: the files are damaged or missing.
    """
    shapes = dict(sorted(stored_shapes(info.path).items()))
    digest = hashlib.sha256(
        json.dumps(
            [info.family, info.config.to_dict(), info.eos_token_ids, shapes], sort_keys=True
        ).encode()
    )
    weights = open_weights(info.path, shapes)
    for name, shape in shapes.items():
        if len(shape) == 1:
            digest.update(weights[name][:,].tobytes())
    return digest.hexdigest()[:16]


def _damaged(folder: Path, why: object) -> CheckpointError:
    first_sentence = (str(why) or type(why).__name__).split(". ")[0].splitlines()[0]
    return CheckpointError(
        f"the weights in {folder} cannot be read ({first_sentence}); "
        "remove the model with `inferneo rm` and convert or pull it again"
    )


def _checkpointer() -> Any:
    """Orbax, with few files and no compression: weights hardly compress, and load faster."""
    import orbax.checkpoint as ocp

    # Its progress notes and timings are for training loops.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=True, use_compression=False)


def _chunked(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Store large weights in chunks, so that reading a slice reads little more than that."""
    import orbax.checkpoint as ocp

    return {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in weights}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
