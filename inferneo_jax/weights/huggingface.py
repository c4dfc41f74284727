"""Reader of local folders in Hugging Face form: transformers and sentence-transformers models."""

import json
import re
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from inferneo_jax.errors import CheckpointError, ConfigError, TokenizerError
from inferneo_jax.weights.source import Array, SourceModel, SourceTensor

_FLOATS = frozenset({"F32", "F16", "BF16"})
_INDEX = "model.safetensors.index.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_VOCABULARIES = ("vocab.*", "*.model", "*.tiktoken")
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def read_huggingface(folder: Path) -> SourceModel:
    """The model in a local folder; tensors are read when asked for.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not safetensors.
        TokenizerError: there is no tokenizer in a form that can be read.
        ConfigError: sentence-transformers modules that are not supported.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    if (folder / "modules.json").exists():
        config["sentence_transformers"] = _sentence_transformers(folder)
    tokenizer_json = _tokenizer_json(folder)
    tokenizer_config = _tokenizer_config(folder)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    _check_lower_case(folder, config, tokenizer)
    generation = _json(folder / "generation_config.json", default={})
    eos_ids = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    if tokenizer_config.get("eos_token"):
        eos_ids |= _ids(tokenizer.token_to_id(tokenizer_config["eos_token"]))
    return SourceModel(
        path=folder,
        config=config,
        tensors=_tensors(folder),
        tokenizer_json=tokenizer_json,
        tokenizer_config=tokenizer_config,
        eos_token_ids=tuple(sorted(eos_ids)),
        bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
        licence=_licence(folder),
        origin={"format": "safetensors", "folder": folder.absolute().name},
    )


def _json(file: Path, default: dict[str, Any] | None = None) -> Any:
    if default is not None and not file.exists():
        return dict(default)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} is no model folder: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _ids(value: Any) -> set[int]:
    """Token ids of a config field that is null, one id or a list of them."""
    return set() if value is None else set(value) if isinstance(value, list) else {int(value)}


# Tensors


def _tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the folder's weight files, in one file or in shards."""
    if (folder / "model.safetensors").exists():
        return _file_tensors(folder / "model.safetensors")
    if not (folder / _INDEX).exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise CheckpointError(
                f"{folder} has only PyTorch pickles, which can run code when they are read; "
                "take a release of the model with safetensors, or save it as such"
            )
        raise CheckpointError(f"{folder} has neither model.safetensors nor {_INDEX}")
    places = _json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map; download it again")
    found: dict[str, SourceTensor] = {}
    for shard in sorted(set(places.values())):
        if PurePath(shard).name != shard:
            raise CheckpointError(f"{folder / _INDEX} names a file outside the folder: {shard!r}")
        found |= _file_tensors(folder / shard)
    if absent := sorted(places.keys() - found.keys()):
        raise CheckpointError(
            f"{folder}: {len(absent)} tensors of the index are in no shard, the first {absent[0]}; "
            "download the shards again"
        )
    return found


def _file_tensors(file: Path) -> dict[str, SourceTensor]:
    try:
        with safe_open(file, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: SourceTensor(
                    shape=tuple(part.get_shape()),
                    read=partial(_read, file, name, part.get_dtype()),
                )
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download the model again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); download it again"
        ) from error


def _read(file: Path, name: str, dtype: str) -> Array:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{file}: {name} is of the type {dtype}; F32, F16 and BF16 are read: "
            "take an unquantized release of the model"
        )
    try:
        with safe_open(file, "numpy") as opened:
            array: Array = opened.get_tensor(name)
            return array
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error


# Tokenizer


def _tokenizer_json(folder: Path) -> str:
    """The folder's fast tokenizer, or one made of its slow one; cuts and pads nothing."""
    file = folder / "tokenizer.json"
    # Of none at all transformers would make one with no words.
    if not file.exists() and not any(any(folder.glob(name)) for name in _VOCABULARIES):
        raise TokenizerError(
            f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary to make one of; "
            "download all files of the model"
        )
    try:
        if file.exists():
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        else:
            from transformers import AutoTokenizer

            slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tokenizer = Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except Exception as error:  # both libraries raise it bare
        raise TokenizerError(
            f"{folder} has no tokenizer that can be read ({error}); it needs a whole tokenizer.json"
        ) from error
    # Training leftovers: the server itself decides what is too long.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return str(tokenizer.to_str())


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "tokenizer_config.json", default={})
    # Repeats what tokenizer.json says, at length.
    config.pop("added_tokens_decoder", None)
    special = _json(folder / "special_tokens_map.json", default={})
    for name in _SPECIAL:
        token = config.get(name, special.get(name))
        config[name] = token["content"] if isinstance(token, dict) else token
    config["chat_template"] = _chat_template(folder, config)
    return dict(config)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """From its own file, or else from the tokenizer's config; of several, the default one."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json", default={}).get(
        "chat_template", config.get("chat_template")
    )
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise TokenizerError(f"{folder}: chat_template is a {type(template).__name__}, not a text")
    return template


# sentence-transformers


def _sentence_transformers(folder: Path) -> dict[str, Any]:
    """Pooling, normalization and the longest input of a sentence-transformers folder."""
    found: dict[str, Any] = {"normalize": False}
    for module in _json(folder / "modules.json"):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Transformer":
            place = folder / module["path"] / "sentence_bert_config.json"
            found |= _json(place, default={})
        elif kind == "Pooling":
            found["pooling"] = _pooling(_json(folder / module["path"] / "config.json"))
        elif kind == "Normalize":
            found["normalize"] = True
        else:
            raise ConfigError(
                f"{folder} has the sentence-transformers module {kind}, which is not supported; "
                "Transformer, Pooling and Normalize are"
            )
    return found


def _pooling(config: dict[str, Any]) -> str:
    if isinstance(config.get("pooling_mode"), str):
        return str(config["pooling_mode"])
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ConfigError(
            f"the pooling is {' and '.join(modes) or 'missing'}; one of {', '.join(_POOLINGS)} "
            "is supported"
        )
    return _POOLINGS[modes[0]]


def _check_lower_case(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """A model that wants its texts in lower case needs a tokenizer that sees to it."""
    wanted = config.get("sentence_transformers", {}).get("do_lower_case")
    if wanted and tokenizer.normalizer and tokenizer.normalizer.normalize_str("A") != "a":
        raise ConfigError(f"{folder} asks for do_lower_case, and its tokenizer keeps capitals")


def _licence(folder: Path) -> str | None:
    """As the model card's front matter names it."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    named = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return named[1].strip("\"'") if named else None
