"""``tokenizer.json`` from anyone, checked before the `tokenizers` library sees it.

The library believes what it reads. Few bytes can make it build automata of gigabytes (long added
tokens), texts that double forty times (a sequence of replacements), or panic, which in Python is a
``BaseException``. Patterns are run by Oniguruma, which panics at a match of 10 million steps.
"""

import base64
import contextlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from inferneo_jax.config import MAX_VOCAB_SIZE
from inferneo_jax.errors import InferneoError, TokenizerError
from inferneo_jax.files import MAX_TEXT_BYTES, TOKENIZER_JSON, one_line, read_object, shown

# The models in use with the most added tokens have 32,768 of them, in 800 KB. The automata that
# find them take about 40 times these bytes.
_MAX_ADDED_TOKENS = 2**16
_MAX_ADDED_BYTES = 2**20
# A unigram model's trie takes about 200 times the bytes of its pieces in the worst case; the
# largest in use has 2.5 MB of them, with long prefixes in common.
_MAX_UNIGRAM_BYTES = 2**23
# Normalizer, pre-tokenizer, post-processor and decoder; the longest in use have 5 KB and 15 steps,
# beside a table of character mappings of 400 KB.
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MAX_STAGE_BYTES = 2**16
_MAX_STEPS = 64
_MAX_CHARSMAP_BYTES = 2**21
_MAX_GROWTH = 8
"""By which factor the replacements of one stage may lengthen a text."""
_MAX_FIELD = 1024
"""Longest text, and largest word in characters, among the fields of a model."""


@contextlib.contextmanager
def guarded(where: str, error: type[InferneoError] = TokenizerError) -> Iterator[None]:
    """Turns whatever the library raises into an error of this package, its panics included."""
    try:
        yield
    except InferneoError:
        raise
    except Exception as problem:  # it raises nothing more specific
        raise error(f"{where}: {one_line(problem)}") from problem
    except BaseException as problem:
        if type(problem).__module__ != "pyo3_runtime":
            raise
        # Not chained: what handles BaseException specially must not meet it again.
        raise error(f"{where}: the tokenizer failed ({one_line(problem)})") from None


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a ``tokenizer.json``; it neither cuts nor pads.

    Raises:
        TokenizerError: the file is missing, broken, or asks for more than its bounds.
    """
    try:
        document = read_object(file, TOKENIZER_JSON, TokenizerError)
    except FileNotFoundError:
        raise TokenizerError(
            f"{file.parent} holds no {file.name}; pull or convert the model again"
        ) from None
    _check(document, str(file))
    # Lengths are for the server to judge.
    document["truncation"] = document["padding"] = None
    # Written again: of a key that is there twice, this has the one that was checked.
    checked = orjson.dumps(document)
    del document
    with guarded(f"{file} cannot be read"):
        return tokenizers.Tokenizer.from_buffer(checked)


def check_added_tokens(contents: Iterable[str], where: str) -> None:
    """Raises TokenizerError when there are more or longer added tokens than any model has."""
    sizes = [len(content.encode()) for content in contents]
    if len(sizes) > _MAX_ADDED_TOKENS or sum(sizes) > _MAX_ADDED_BYTES:
        raise TokenizerError(
            f"{where}: there are {len(sizes)} added tokens of {sum(sizes)} bytes; at most "
            f"{_MAX_ADDED_TOKENS} of {_MAX_ADDED_BYTES} bytes are supported"
        )


def template_text(value: object, where: str) -> str | None:
    """A ``chat_template`` field: a text, or several by name, of which chat uses the default one.

    Raises:
        TokenizerError: it is something else.
    """
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict)]
        if len(named) < len(value) or not all(isinstance(e.get("name"), str) for e in named):
            raise TokenizerError(
                f"{where}: chat_template is neither a text nor a list of objects with name and "
                "template"
            )
        value = {entry["name"]: entry.get("template") for entry in named}.get("default")
    if not isinstance(value, str | None):
        raise TokenizerError(f"{where}: chat_template is {shown(value)}; it must be a text")
    if value is not None and len(value) > MAX_TEXT_BYTES:
        raise TokenizerError(
            f"{where}: chat_template has {len(value)} characters; at most {MAX_TEXT_BYTES} are read"
        )
    return value


def token_ids(value: object, where: str) -> set[int]:
    """The token ids of a field that is null, one id or a list of them.

    Raises:
        TokenizerError: there is something else among them.
    """
    listed = [] if value is None else value if isinstance(value, list) else [value]
    for index in listed:
        if type(index) is not int or not 0 <= index < MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"{where} is {shown(value)}; token ids are integers from 0 to {MAX_VOCAB_SIZE - 1}"
            )
    return set(listed)


def _check(document: dict[str, Any], where: str) -> None:
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise TokenizerError(f"{where}: added_tokens is not a list of objects with content")
    check_added_tokens((token["content"] for token in added), where)
    token_ids([token.get("id") for token in added], f"{where}: the id of an added token")
    _check_model(document.get("model"), where)
    for stage in _STAGES:
        _check_stage(document.get(stage), f"{where}: {stage}")


def _check_model(model: object, where: str) -> None:
    if not isinstance(model, dict):
        raise TokenizerError(f"{where}: model is {shown(model)}; it must be an object")
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        if bad := [value for value in vocab.values() if type(value) is not int]:
            raise TokenizerError(f"{where}: model.vocab has the id {shown(bad[0])}")
        least, most = min(vocab.values(), default=0), max(vocab.values(), default=0)
        token_ids([least, most], f"{where}: the lowest and highest id of model.vocab")
    elif isinstance(vocab, list):
        pieces = [entry[0] for entry in vocab if isinstance(entry, list) and entry]
        size = sum(len(piece.encode()) for piece in pieces if isinstance(piece, str))
        if size > _MAX_UNIGRAM_BYTES:
            raise TokenizerError(
                f"{where}: the pieces of model.vocab have {size} bytes; "
                f"at most {_MAX_UNIGRAM_BYTES} are supported"
            )
    for key, value in model.items():
        size = len(value) if isinstance(value, str) else value if type(value) is int else 0
        if size > _MAX_FIELD and key != "unk_id":
            raise TokenizerError(f"{where}: model.{key} is {shown(value)}; at most {_MAX_FIELD}")


def _check_stage(stage: object, where: str) -> None:
    steps = list(_objects(stage))
    charsmaps = [step["precompiled_charsmap"] for step in steps if "precompiled_charsmap" in step]
    table = sum(len(each) for each in charsmaps if isinstance(each, str))
    size = len(orjson.dumps(stage)) - table
    if size > _MAX_STAGE_BYTES or table > _MAX_CHARSMAP_BYTES:
        raise TokenizerError(
            f"{where} has {size} bytes and {table} of character mappings; at most "
            f"{_MAX_STAGE_BYTES} and {_MAX_CHARSMAP_BYTES} are supported"
        )
    typed = [step for step in steps if isinstance(step.get("type"), str)]
    if len(typed) > _MAX_STEPS:
        raise TokenizerError(f"{where} has {len(typed)} steps; at most {_MAX_STEPS} are supported")
    growth = 1.0
    for step in typed:
        if step["type"] == "Replace":
            growth *= max(1.0, _growth(step.get("pattern"), step.get("content")))
        elif step["type"] == "TemplateProcessing":
            _check_template(step, where)
        elif step["type"] == "Precompiled":
            _check_charsmap(step.get("precompiled_charsmap"), where)
    if growth > _MAX_GROWTH:
        raise TokenizerError(
            f"{where} has replacements that lengthen a text {growth:.3g} times; "
            f"at most {_MAX_GROWTH} times is supported"
        )


def _growth(pattern: object, content: object) -> float:
    """How many characters a replacement makes of one; a pattern may match between two of them."""
    if not isinstance(content, str):
        return 1.0
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return len(content) / len(literal)
    return 1.0 + len(content)


def _check_template(step: dict[str, Any], where: str) -> None:
    """The library panics at a text whose template names a token that it does not define."""
    defined = step.get("special_tokens")
    for name in ("single", "pair"):
        for piece in step.get(name) or ():
            special = piece.get("SpecialToken") if isinstance(piece, dict) else None
            named = special.get("id") if isinstance(special, dict) else None
            if isinstance(named, str) and (not isinstance(defined, dict) or named not in defined):
                raise TokenizerError(
                    f"{where} adds {shown(named)}, which its special_tokens do not define"
                )


def _check_charsmap(encoded: object, where: str) -> None:
    """The library panics at a table that is not what sentencepiece writes.

    That is the length of a trie, the trie, and a text in UTF-8, all in base64.
    """
    try:
        data = base64.b64decode(encoded if isinstance(encoded, str) else "", validate=True)
        (size,) = struct.unpack_from("<I", data)
        data[4 + size :].decode()
    except (ValueError, struct.error):
        size = -1
    if size < 0 or size % 4 or size > len(data) - 4:
        raise TokenizerError(f"{where} has a precompiled_charsmap that is none of sentencepiece")


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """Every object within a value, in the order of the file."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += reversed(value.values())
        elif isinstance(value, list):
            left += reversed(value)
