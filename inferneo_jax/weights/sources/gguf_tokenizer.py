"""The tokenizer that a GGUF file describes in its metadata.

A GGUF file carries no ``tokenizer.json``. It lists the vocabulary and the merges, and names the
rule that splits text before merging. That rule affects the ids as much as the merges do, so an
unknown name is an error rather than a guess.

Sources: the GGUF specification (``tokenizer.ggml.*``), and for each pre-tokenizer name the split
expression in the ``tokenizer.json`` of the models that llama.cpp gives this name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from inferneo_jax.config import MAX_VOCAB_SIZE
from inferneo_jax.errors import TokenizerError
from inferneo_jax.files import shown
from inferneo_jax.text.tokenizer_json import check_added_tokens, guarded, template_text
from inferneo_jax.weights.sources.gguf_metadata import Metadata


class TokenType(IntEnum):
    """The kinds of tokens in ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How a byte-level tokenizer splits text into pieces; merges never cross their boundaries.

    With ``pattern`` None, the expression built into the byte-level step (GPT-2's) applies. With
    ``whole_pieces``, a piece is looked up in the vocabulary before merges are tried.
    """

    pattern: str | None = None
    single_digits: bool = False
    compose: bool = False
    whole_pieces: bool = False
    add_bos: bool = False


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = _Split()
_DIGITS = _Split(single_digits=True)
_LLAMA3 = _Split(pattern=_WORDS % r"\p{N}{1,3}", whole_pieces=True, add_bos=True)
_QWEN2 = _Split(pattern=_WORDS % r"\p{N}", compose=True)

_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
}

_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Limits of sentencepiece vocabularies. The largest in use has 262,144 pieces of 1.9 million
# characters, which yield half a million merges.
_MAX_PIECES_LENGTH = 2**22
_MAX_MERGES = 2**20
_MAX_TOKEN_LENGTH = 1024
_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in sentencepiece vocabularies

# The special tokens of a WordPiece vocabulary: the key with its id, and its text without that key.
_NAMED_PIECES = {
    "cls_token": ("bos_token_id", "[CLS]"),
    "sep_token": ("seperator_token_id", "[SEP]"),
    "unk_token": ("unknown_token_id", "[UNK]"),
    "pad_token": ("padding_token_id", "[PAD]"),
    "mask_token": ("mask_token_id", "[MASK]"),
}
_CONTINUED = "##"  # begins each piece of a word but the first, in WordPiece vocabularies


def gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer that GGUF metadata describes.

    Args:
        metadata: plain Python values by GGUF key; only keys under ``tokenizer.`` are read.

    Returns:
        The tokenizer and the content of its ``tokenizer_config.json``: the chat template, the named
        tokens, and which of them encoding adds.

    Raises:
        TokenizerError: a key is missing, values contradict each other, or this kind of model or
            pre-tokenizer is not supported.
    """
    keys = Metadata(metadata, TokenizerError)
    tokens = keys.texts("tokenizer.ggml.tokens")
    keys.require("tokenizer.ggml.model")
    model = keys.text("tokenizer.ggml.model")
    if model == "bert":
        return _word_piece(keys, tokens, _token_types(keys, len(tokens)))
    vocab = _vocabulary(tokens)
    types = _token_types(keys, len(tokens))
    named = _named_tokens(keys, tokens)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(keys, vocab)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(keys, vocab, types, named["unk_token"]), True
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {shown(model)}; supported are 'gpt2', 'llama' and 'bert'. "
            "Convert the model from its Hugging Face files instead"
        )
    _add_tokens(tokenizer, tokens, types, named)
    add_bos = add_bos and named["bos_token"] is not None
    config: dict[str, Any] = {
        **named,
        "add_bos_token": keys.flag("tokenizer.ggml.add_bos_token", add_bos),
        "add_eos_token": keys.flag("tokenizer.ggml.add_eos_token", False),
        "chat_template": template_text(
            keys.text("tokenizer.chat_template"), "tokenizer.chat_template"
        ),
        "clean_up_tokenization_spaces": False,
    }
    _add_post_processor(tokenizer, config, vocab)
    return tokenizer, config


def _add_tokens(
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    types: Sequence[TokenType],
    named: Mapping[str, str | None],
) -> None:
    """Make the tokens that are no pieces of text, and those of the user, added tokens."""
    # With `normalized=False`, special tokens are matched in the text before normalization.
    in_config = set(named.values())
    special, mine = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN) or token in in_config:
            special.append(token)
        elif kind is TokenType.USER_DEFINED:
            mine.append(token)
    check_added_tokens([*special, *mine], "tokenizer.ggml.tokens")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in mine])


def _token_types(keys: Metadata, count: int) -> list[TokenType]:
    key = "tokenizer.ggml.token_type"
    if key not in keys:
        return [TokenType.NORMAL] * count
    listed = keys.numbers(key)
    if len(listed) != count:
        raise TokenizerError(f"{key} lists {len(listed)} tokens, tokenizer.ggml.tokens {count}")
    known: dict[float, TokenType] = {kind.value: kind for kind in TokenType}
    try:
        return [known[kind] for kind in listed]
    except KeyError as error:
        raise TokenizerError(f"{key} has {error} for a token; known are 1 to 6") from None


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    if len(tokens) > MAX_VOCAB_SIZE:
        raise TokenizerError(
            f"tokenizer.ggml.tokens has {len(tokens)} tokens; "
            f"at most {MAX_VOCAB_SIZE} are supported"
        )
    for index, token in enumerate(tokens):
        if len(token) > _MAX_TOKEN_LENGTH:
            raise TokenizerError(
                f"tokenizer.ggml.tokens[{index}] has {len(token)} characters; "
                f"at most {_MAX_TOKEN_LENGTH} are supported"
            )
        if vocab.setdefault(token, index) != index:
            raise TokenizerError(
                f"tokenizer.ggml.tokens holds {shown(token)} twice, as {vocab[token]} "
                f"and as {index}"
            )
    return vocab


def _named_tokens(keys: Metadata, tokens: Sequence[str]) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for name, last in _NAMED.items():
        index = keys.integer(key := f"tokenizer.ggml.{last}")
        if index is not None and index >= len(tokens):
            raise TokenizerError(f"{key} is {index}; the vocabulary has {len(tokens)} tokens")
        named[name] = None if index is None else tokens[index]
    return named


def _byte_level(keys: Metadata, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Build byte-pair encoding over bytes; also return whether it adds BOS by default."""
    name = keys.text("tokenizer.ggml.pre", "default")
    split = _SPLITS.get(name or "")
    if split is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {shown(name)}; supported are {', '.join(sorted(_SPLITS))}. "
            "Convert the model from its Hugging Face files instead"
        )
    merges = []
    for line in keys.texts("tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise TokenizerError(
                f"tokenizer.ggml.merges holds {shown(line)}, which is no pair of tokens"
            )
        merges.append((left, right))
    with guarded("tokenizer.ggml.merges does not fit the tokens"):
        tokenizer = Tokenizer(
            models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_pieces)
        )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    built_in = split.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.add_bos


def _sentencepiece(
    keys: Metadata,
    vocab: dict[str, int],
    types: Sequence[TokenType],
    unknown: str | None,
) -> Tokenizer:
    """Build byte-pair encoding by score, with byte tokens for text outside the vocabulary."""
    scores = keys.numbers("tokenizer.ggml.scores")
    if len(scores) != len(vocab):
        raise TokenizerError(
            f"tokenizer.ggml.scores lists {len(scores)} tokens, tokenizer.ggml.tokens {len(vocab)}"
        )
    merges = _merges_by_score(vocab, types, scores)
    with guarded("tokenizer.ggml.tokens cannot be used"):
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=TokenType.BYTE in types,
            )
        )
    prefix = keys.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_MARK, prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[decoders.Decoder] = [
        decoders.Replace(_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _word_piece(
    keys: Metadata, tokens: Sequence[str], types: Sequence[TokenType]
) -> tuple[Tokenizer, dict[str, Any]]:
    """Build BERT's WordPiece, and the content of its ``tokenizer_config.json``.

    llama.cpp's converter marks the pieces that begin a word, while WordPiece marks the others.
    """
    tokens = [_unmarked(token, kind) for token, kind in zip(tokens, types, strict=True)]
    vocab = _vocabulary(tokens)
    named: dict[str, str | None] = {}
    for name, (last, text) in _NAMED_PIECES.items():
        index = keys.integer(key := f"tokenizer.ggml.{last}", vocab.get(text))
        if index is not None and index >= len(tokens):
            raise TokenizerError(f"{key} is {index}; the vocabulary has {len(tokens)} tokens")
        if index is None and name in ("cls_token", "sep_token", "unk_token"):
            raise TokenizerError(f"the GGUF metadata has no {key}, and the vocabulary no {text}")
        named[name] = None if index is None else tokens[index]
    # Files made before the key existed do not say. Capitals are in cased vocabularies only.
    cased = any(
        kind is TokenType.NORMAL and not _is_bracketed(token) and re.search("[A-Z]", token)
        for token, kind in zip(tokens, types, strict=True)
    )
    lower_case = keys.flag("tokenizer.ggml.normalizer.lowercase", not cased)
    with guarded("tokenizer.ggml.tokens cannot be used"):
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=str(named["unk_token"])))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lower_case,
        strip_accents=keys.flag("tokenizer.ggml.normalizer.strip_accents", lower_case),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUED)
    _add_tokens(tokenizer, tokens, types, named)
    begin, end = str(named["cls_token"]), str(named["sep_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B:1", f"{end}:1"],
        special_tokens=[(token, vocab[token]) for token in {begin: None, end: None}],
    )
    return tokenizer, {**named, "chat_template": None}


def _unmarked(token: str, kind: TokenType) -> str:
    """A token of WordPiece as it was before llama.cpp's converter changed it.

    The converter leaves special tokens alone, and did so with whatever is in brackets.
    """
    if kind is TokenType.CONTROL:
        return token
    if token.startswith(_MARK) and token != _MARK:
        return token.removeprefix(_MARK)
    return token if _is_bracketed(token) else _CONTINUED + token


def _is_bracketed(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _merges_by_score(
    vocab: dict[str, int], types: Sequence[TokenType], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The pairs of tokens that form a token, in the order in which sentencepiece merges them.

    Sentencepiece joins the neighbours whose union scores highest. Among several ways to form the
    same token, the one with the longer left part comes first.
    """
    plain = {token: token for token, index in vocab.items() if types[index] is TokenType.NORMAL}
    if (length := sum(map(len, plain))) > _MAX_PIECES_LENGTH:
        raise TokenizerError(
            f"tokenizer.ggml.tokens has {length} characters; at most {_MAX_PIECES_LENGTH} can be "
            "made into merges"
        )
    pairs: list[tuple[float, int, int, str, str]] = []
    for token in plain:
        for cut in range(1, len(token)):
            # The pairs refer to the vocabulary's own strings and need no memory for copies.
            left = plain.get(token[:cut])
            if left is not None and (right := plain.get(token[cut:])) is not None:
                pairs.append((-scores[vocab[token]], -cut, vocab[token], left, right))
        if len(pairs) > _MAX_MERGES:
            raise TokenizerError(
                f"tokenizer.ggml.tokens can be made of each other in more than {_MAX_MERGES} ways"
            )
    pairs.sort()
    return [(left, right) for *_, left, right in pairs]


def _add_post_processor(
    tokenizer: Tokenizer, config: Mapping[str, Any], vocab: Mapping[str, int]
) -> None:
    before = config["bos_token"] if config["add_bos_token"] else None
    after = config["eos_token"] if config["add_eos_token"] else None
    for wanted, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        if config[wanted] and config[name] is None:
            raise TokenizerError(
                f"the GGUF metadata asks to add a token by {wanted}, but names no {name}"
            )
    added = [token for token in (before, after) if token is not None]
    if not added:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in (before, "$A", after) if part is not None],
        pair=[part for part in (before, "$A", after, before, "$B", after) if part is not None],
        special_tokens=[(token, vocab[token]) for token in dict.fromkeys(added)],
    )
