"""Reader of local Hugging Face folders: transformers and sentence-transformers models."""

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from inferneo_jax.errors import CheckpointError, ConfigError, TokenizerError
from inferneo_jax.files import is_inside, read_json, read_object, read_text, shown
from inferneo_jax.text.tokenizer_json import guarded, read_tokenizer, template_text, token_ids
from inferneo_jax.weights.sources.safetensors import read_tensors
from inferneo_jax.weights.sources.source import SourceModel

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_VOCABULARIES = ("vocab.*", "*.model", "*.tiktoken")
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def read_huggingface(folder: Path) -> SourceModel:
    """Open the model in a local folder; its tensors are read on demand.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are not safetensors.
        TokenizerError: the folder has no tokenizer in a supported form.
        ConfigError: the sentence-transformers modules are not supported.
    """
    folder = Path(folder)
    config = _json(folder / "config.json")
    if (folder / "modules.json").exists():
        config["sentence_transformers"] = _sentence_transformers(folder)
    tokenizer = _tokenizer(folder)
    tokenizer_config = _tokenizer_config(folder)
    _check_lower_case(folder, config, tokenizer)
    generation = _json(folder / "generation_config.json", default={})
    eos_ids = token_ids(
        generation.get("eos_token_id", config.get("eos_token_id")), f"{folder}: eos_token_id"
    )
    eos = tokenizer.token_to_id(tokenizer_config["eos_token"] or "")
    bos_ids = token_ids(config.get("bos_token_id"), f"{folder}: bos_token_id")
    return SourceModel(
        path=folder,
        format="safetensors",
        config=config,
        tensors=read_tensors(folder),
        tokenizer_json=tokenizer.to_str(),
        tokenizer_config=tokenizer_config,
        eos_token_ids=tuple(sorted(eos_ids | ({eos} if eos is not None else set()))),
        bos_token_id=min(bos_ids, default=None),
        licence=_licence(folder),
        origin={"folder": folder.absolute().name},
    )


def _json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError:
        if default is not None:
            return dict(default)
        raise CheckpointError(f"{file.parent} is no model folder: it has no {file.name}") from None


# Tokenizer


def _tokenizer(folder: Path) -> Tokenizer:
    """The folder's fast tokenizer, or one converted from its slow one; never truncates or pads."""
    file = folder / "tokenizer.json"
    if file.exists():
        return read_tokenizer(file)
    # Without any vocabulary file, transformers would build a tokenizer with no words.
    if not any(any(folder.glob(name)) for name in _VOCABULARIES):
        raise TokenizerError(
            f"{folder} has no tokenizer: neither tokenizer.json nor a vocabulary to make one of; "
            "download all files of the model"
        )
    with guarded(f"{folder} has no tokenizer that can be read; it needs a tokenizer.json"):
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = Tokenizer.from_str(slow.backend_tokenizer.to_str())
        # Leftovers from training: the server itself decides what is too long.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "tokenizer_config.json", default={})
    # This repeats the content of tokenizer.json at length.
    config.pop("added_tokens_decoder", None)
    special = _json(folder / "special_tokens_map.json", default={})
    for name in _SPECIAL:
        token = config.get(name, special.get(name))
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise TokenizerError(f"{folder}: {name} is {shown(token)}; it must be a text")
        config[name] = token
    config["chat_template"] = _chat_template(folder, config)
    return config


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template from its own file, or else from the tokenizer's config.

    If there are several templates, the default one is returned.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file, TokenizerError)
    own = _json(folder / "chat_template.json", default={})
    return template_text(own.get("chat_template", config.get("chat_template")), str(folder))


# sentence-transformers


def _sentence_transformers(folder: Path) -> dict[str, Any]:
    """The pooling, normalization and maximum input length of a sentence-transformers folder."""
    found: dict[str, Any] = {"normalize": False}
    file = folder / "modules.json"
    for module in read_json(file):
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise CheckpointError(f"{file} has the module {shown(module)}, which names no type")
        if not is_inside(folder, path := module.get("path", "")):
            raise CheckpointError(f"{file} has the path {shown(path)}, outside of the folder")
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Transformer":
            found |= _json(folder / path / "sentence_bert_config.json", default={})
        elif kind == "Pooling":
            found["pooling"] = _pooling(_json(folder / path / "config.json"))
        elif kind == "Normalize":
            found["normalize"] = True
        else:
            raise ConfigError(
                f"{folder} has the sentence-transformers module {shown(kind)}, which is not "
                "supported; Transformer, Pooling and Normalize are"
            )
    return found


def _pooling(config: dict[str, Any]) -> str:
    if isinstance(config.get("pooling_mode"), str):
        return str(config["pooling_mode"])
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        named = shown(" and ".join(modes)) if modes else "missing"
        raise ConfigError(f"the pooling is {named}; one of {', '.join(_POOLINGS)} is supported")
    return _POOLINGS[modes[0]]


def _check_lower_case(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Check that a model that requires lower-case text has a tokenizer that lower-cases it."""
    wanted = config.get("sentence_transformers", {}).get("do_lower_case")
    if not wanted or not tokenizer.normalizer:
        return
    with guarded(f"{folder}: the normalizer of its tokenizer fails"):
        lowered = tokenizer.normalizer.normalize_str("A")
    if lowered != "a":
        raise ConfigError(f"{folder} asks for do_lower_case, and its tokenizer keeps capitals")


def _licence(folder: Path) -> str | None:
    """The licence named in the model card's front matter."""
    try:
        card = read_text(folder / "README.md")
    except CheckpointError:
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    named = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return named[1].strip("\"'") if named else None
