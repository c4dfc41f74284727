import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferneo_jax.errors import TokenizerError
from inferneo_jax.text.detokenize import IncrementalDecoder
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.weights.sources.gguf_tokenizer import gguf_tokenizer
from tests.support.model_files import marked_words
from tests.support.paths import GOLDEN
from tests.support.server_process import EMBEDDING_MODEL

MARK = "▁"
SPACE = "Ġ"  # how byte-level vocabularies spell a space


def byte_level(**changes: Any) -> dict[str, Any]:
    """Letters a and b, digits, a space, and merges within and across what rules split."""
    merges = ["1 2", "12 3", "123 4", f"{SPACE} 1", f"{SPACE} a", "a b", f"{SPACE} {SPACE}"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = ["<end>", "<mine>", *"ab1234'sS", SPACE, *merged]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 4] + [1] * (len(tokens) - 2),
        "merges": merges,
        "eos_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def pieces(metadata: dict[str, Any], text: str) -> list[str]:
    tokenizer = Tokenizer(*gguf_tokenizer(metadata))
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "ab 1234", ["ab", " ", "1", "2", "3", "4"]),
        ("smollm", "a  1", ["a", "  ", "1"]),
        ("gpt-2", "ab 1234", ["ab", " ", "1234"]),
        ("gpt-2", "a  1", ["a", " ", " 1"]),
        ("gpt-2", "a1234", ["a", "1234"]),
        ("llama-bpe", "a1234 1", ["a", "123", "4", " ", "1"]),
        ("qwen2", "a123 a", ["a", "1", "2", "3", " a"]),
        (None, "a1234", ["a", "1234"]),
    ],
)
def test_merges_stay_within_what_the_named_rule_splits(pre, text, expected):
    assert pieces(byte_level(pre=pre), text) == expected


def test_control_tokens_are_special_and_user_tokens_only_whole():
    tokenizer = Tokenizer(*gguf_tokenizer(byte_level()))
    assert tokenizer.encode("a<end>b<mine>") == [2, 0, 3, 1]
    assert tokenizer.special_ids == tokenizer.eos_token_ids == {0}
    assert tokenizer.decode([0, 1]) == "<mine>"


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"add_bos_token": True}, [1, 2]),
        ({"add_bos_token": False}, [2]),
        ({}, [2]),
        ({"pre": "llama-bpe"}, [1, 2]),
        ({"pre": "llama-bpe", "bos_token_id": None}, [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2, 0]),
    ],
)
def test_a_text_gets_the_tokens_that_the_file_asks_for(changes, added):
    tokenizer = Tokenizer(*gguf_tokenizer(byte_level(**{"bos_token_id": 1} | changes)))
    assert tokenizer.encode("a") == added
    assert tokenizer.encode("a", add_special_tokens=False) == [2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; supported are"),
        ({"model": "bert"}, "no tokenizer.ggml.bos_token_id, and the vocabulary no [CLS]"),
        ({"model": None}, "no tokenizer.ggml.model"),
        ({"pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat'; supported are"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "'ab', which is no pair"),
        ({"merges": ["a x"]}, "tokenizer.ggml.merges does not fit"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' twice, as 0 and as 2"),
        ({"token_type": [1]}, "token_type lists 1 tokens"),
        ({"token_type": [9] * 19}, "token_type has 9 for a token; known are 1 to 6"),
        ({"eos_token_id": 19}, "eos_token_id is 19; the vocabulary has 19 tokens"),
        ({"add_bos_token": True}, "by add_bos_token, but names no bos_token"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.0]}, "scores lists 1 tokens"),
    ],
)
def test_metadata_that_cannot_work_is_refused_by_name(changes, says):
    with pytest.raises(TokenizerError, match=re.escape(says)):
        gguf_tokenizer(byte_level(**changes))


# A sentencepiece vocabulary: <unk>, <s>, </s>, the 256 bytes, then scored pieces.
WORDS = [MARK, "a", "b", "c", "ab", "bc", MARK + "a", "abc", "aa", MARK + MARK, MARK + "abc", "cab"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
SCORES = {word: -float(order * 7 % len(WORDS)) for order, word in enumerate(WORDS)}


def sentencepiece(**changes: Any) -> Tokenizer:
    keys = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS),
        "scores": [SCORES.get(token, 0.0) for token in TOKENS],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return Tokenizer(*gguf_tokenizer(metadata))


prefixed, bare = sentencepiece(), sentencepiece(add_space_prefix=False)


def by_hand(text: str) -> list[int]:
    """Sentencepiece's own rule: join the neighbours whose union scores highest, leftmost first."""
    symbols = list(text.replace(" ", MARK))
    while True:
        unions = [left + right for left, right in pairwise(symbols)]
        known = [(-SCORES[union], at) for at, union in enumerate(unions) if union in SCORES]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [unions[at]]
    ids = []
    for symbol in symbols:
        spelled = [symbol] if symbol in SCORES else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        ids += [TOKENS.index(token) for token in spelled]
    return ids


@given(st.text("abc d\n"))
@example("abcab  aab")
def test_pieces_join_in_the_order_of_their_scores(text):
    assert bare.encode(text, add_special_tokens=False) == by_hand(text)


@given(st.text("abc é\n", min_size=1))
def test_a_text_starts_with_a_space_which_decoding_takes_back(text):
    ids = prefixed.encode(text)
    assert ids[0] == prefixed.bos_token_id == 1
    assert prefixed.decode(ids) == text.removeprefix(" ")
    assert bare.decode(bare.encode(text)) == text


@given(st.lists(st.sampled_from("abc é🙂\n")), st.booleans())
def test_marked_tokens_stream_as_they_decode(letters, prefix):
    tokenizer = prefixed if prefix else bare
    ids = tokenizer.encode("".join(letters))
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_byte_tokens_are_their_byte_and_marks_are_spaces():
    assert bare.token_bytes(TOKENS.index("<0xE9>")) == b"\xe9"
    assert bare.token_bytes(TOKENS.index(MARK + "a")) == b" a"


# WordPiece, in which llama.cpp's converter marks what begins a word, and not what continues it.
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_WORDS = [
    "a",
    "b",
    "ab",
    "e",
    "##a",
    "##b",
    "##ab",
    "##e",
    ",",
    "\N{CJK UNIFIED IDEOGRAPH-4E2D}",
]


def word_piece(words: list[str], **changes: Any) -> dict[str, Any]:
    tokens = marked_words([*BERT_SPECIAL, *words], len(BERT_SPECIAL))
    keys = {
        "model": "bert",
        "tokens": tokens,
        "token_type": [3] * len(BERT_SPECIAL) + [1] * len(words),
        "bos_token_id": 2,
        "seperator_token_id": 3,
        "unknown_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def transformers_ids(words: list[str], text: str, *, lower_case: bool) -> list[int]:
    from transformers import BertTokenizerFast

    vocab = {token: index for index, token in enumerate([*BERT_SPECIAL, *words])}
    found: list[int] = BertTokenizerFast(vocab=vocab, do_lower_case=lower_case).encode(text)
    return found


@pytest.mark.parametrize(
    ("words", "changes", "lower_case"),
    [
        (BERT_WORDS, {}, True),
        (BERT_WORDS, {"normalizer.lowercase": False}, False),
        ([*BERT_WORDS, "B", "##A"], {}, False),
        ([*BERT_WORDS, "B", "##A"], {"normalizer.lowercase": True}, True),
        (BERT_WORDS, {"token_type": None}, True),
        (BERT_WORDS, {"bos_token_id": None, "seperator_token_id": None}, True),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "ab ba,abab",
        "aBAb \u00c9a\u0301 e\u0301",
        "a\u4e2db x",
        "[MASK]a [SEP] [mask]",
        "a\n\tb\u00a0a\u0000b\u200b",
        "ab" * 51,
        "\u2581a ##b",
    ],
)
def test_word_pieces_are_those_of_transformers(words, changes, lower_case, text):
    tokenizer = Tokenizer(*gguf_tokenizer(word_piece(words, **changes)))
    assert tokenizer.encode(text) == transformers_ids(words, text, lower_case=lower_case)


def test_word_pieces_decode_without_marks():
    tokenizer = Tokenizer(*gguf_tokenizer(word_piece(BERT_WORDS)))
    assert tokenizer.special_ids == set(range(5))
    assert tokenizer.decode(tokenizer.encode("abea, b")) == "abea, b"
    assert tokenizer.token_bytes(9) == b"a"


@pytest.mark.real
def test_a_real_word_piece_vocabulary_survives_the_converters_marks(real_checkpoints: Path) -> None:
    vocab = json.loads((real_checkpoints / EMBEDDING_MODEL / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].__getitem__)
    types = [3 if token in BERT_SPECIAL else 1 for token in tokens]
    marked = [
        token if kind == 3 else marked_words([token], 0)[0]
        for token, kind in zip(tokens, types, strict=True)
    ]
    older = [
        token if token.startswith("[un") else mark
        for token, mark in zip(tokens, marked, strict=True)
    ]
    for listed in (marked, older):
        metadata = {"model": "bert", "tokens": listed, "token_type": types}
        named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
        tokenizer = Tokenizer(*gguf_tokenizer(named))
        for case in json.loads((GOLDEN / "tokens.json").read_text())["cases"]:
            assert tokenizer.encode(case["text"]) == case["embedding_ids"]
