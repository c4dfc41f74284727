"""Reads an untrusted ``tokenizer.json`` and checks it before the `tokenizers` library sees it.

The library trusts its input. A small file can make it build automata of gigabytes (long added
tokens), double a text forty times (a sequence of replacements), or panic, which in Python raises a
``BaseException``. Patterns are run by Oniguruma, which panics after 10 million steps of a match.
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

# The models in use have at most 32,768 added tokens, in 800 KB. The automata that find them take
# about 40 times as many bytes.
_MAX_ADDED_TOKENS = 2**16
_MAX_ADDED_BYTES = 2**20
# In the worst case, a unigram model's trie takes about 200 times the bytes of its pieces. The
# largest model in use has 2.5 MB of pieces, which share long prefixes.
_MAX_UNIGRAM_BYTES = 2**23
# The longest stages in use have 5 KB and 15 steps, plus a table of character mappings of 400 KB.
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MAX_STAGE_BYTES = 2**16
_MAX_STEPS = 64
_MAX_CHARSMAP_BYTES = 2**21
_MAX_GROWTH = 8
"""Maximum factor by which the replacements of one stage may lengthen a text."""
_MAX_FIELD = 1024
"""Maximum length of a string, and maximum value of an integer, among the fields of a model."""


@contextlib.contextmanager
def guarded(where: str, error: type[InferneoError] = TokenizerError) -> Iterator[None]:
    """Convert whatever the library raises, including panics, to an error of this package."""
    try:
        yield
    except InferneoError:
        raise
    except Exception as problem:  # it raises nothing more specific
        raise error(f"{where}: {one_line(problem)}") from problem
    except BaseException as problem:
        if type(problem).__module__ != "pyo3_runtime":
            raise
        # Not chained: code that handles BaseException specially must not see the panic.
        raise error(f"{where}: the tokenizer failed ({one_line(problem)})") from None


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """Read the tokenizer in a ``tokenizer.json``; it neither truncates nor pads.

    Raises:
        TokenizerError: the file is missing or malformed, or exceeds the bounds above.
    """
    try:
        document = read_object(file, TOKENIZER_JSON, TokenizerError)
    except FileNotFoundError:
        raise TokenizerError(
            f"{file.parent} holds no {file.name}; pull or convert the model again"
        ) from None
    _check(document, str(file))
    # The server handles lengths itself.
    document["truncation"] = document["padding"] = None
    # Serialized again, so that for a repeated key the library sees the value that was checked.
    checked = orjson.dumps(document)
    del document
    with guarded(f"{file} cannot be read"):
        return tokenizers.Tokenizer.from_buffer(checked)


def check_added_tokens(contents: Iterable[str], where: str) -> None:
    """Raise TokenizerError if the added tokens are too many or too long."""
    sizes = [len(content.encode()) for content in contents]
    if len(sizes) > _MAX_ADDED_TOKENS or sum(sizes) > _MAX_ADDED_BYTES:
        raise TokenizerError(
            f"{where}: there are {len(sizes)} added tokens of {sum(sizes)} bytes; at most "
            f"{_MAX_ADDED_TOKENS} of {_MAX_ADDED_BYTES} bytes are supported"
        )


def template_text(value: object, where: str) -> str | None:
    """The template in a ``chat_template`` field: its text, or the default one of a named list.

    Raises:
        TokenizerError: the field is malformed or too long.
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
    """The token ids of a field, which is null, one id or a list of ids.

    Raises:
        TokenizerError: a value is not a token id.
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
    """The most characters that a replacement makes of one; patterns may match empty strings."""
    if not isinstance(content, str):
        return 1.0
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return len(content) / len(literal)
    return 1.0 + len(content)


def _check_template(step: dict[str, Any], where: str) -> None:
    """Check that a template defines the tokens that it names; the library panics otherwise."""
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
    """Check the form of sentencepiece's table of characters; the library panics otherwise.

    The table is base64 of the length of a trie, the trie itself, and a text in UTF-8.
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
    """Iterate over all objects within a value, in the order of the file."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield value
            left += reversed(value.values())
        elif isinstance(value, list):
            left += reversed(value)
