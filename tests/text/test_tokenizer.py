import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from inferneo_jax.errors import RequestError, TokenizerError
from inferneo_jax.text.tokenizer import Tokenizer
from tests.support.paths import GOLDEN

TINY = GOLDEN / "families" / "llama-tied"
TINY_ENCODER = GOLDEN / "families" / "bert"
CASES = json.loads((GOLDEN / "tokens.json").read_text())["cases"]

tiny = Tokenizer.from_directory(TINY)
ids_of_tiny = st.lists(st.integers(0, tiny.vocab_size - 1))


def test_the_golden_texts_are_all_different():
    assert len({case["text"] for case in CASES}) == len(CASES) > 60


@pytest.mark.real
@pytest.mark.parametrize(
    ("model", "key", "golden", "text", "ids"),
    [
        ("smollm2-135m-instruct", "chat", "chat.json", "prompt", "prompt_ids"),
        ("all-minilm-l6-v2", "embedding", "embeddings.json", "text", "ids"),
    ],
)
def test_a_real_tokenizer_reads_and_writes_as_the_reference(
    real_checkpoints, model, key, golden, text, ids
):
    tokenizer = Tokenizer.from_directory(real_checkpoints / model)
    encoded = tokenizer.encode_batch([case["text"] for case in CASES])
    assert encoded == [case[f"{key}_ids"] for case in CASES]
    for case, found in zip(CASES, encoded, strict=True):
        expected = case[f"{key}_text"]
        assert tokenizer.decode(found) == (case["text"] if expected is None else expected)
    cases = json.loads((GOLDEN / golden).read_text())["cases"]
    assert [tokenizer.encode(case[text]) for case in cases] == [case[ids] for case in cases]


@pytest.mark.real
def test_the_real_chat_model_says_what_its_special_tokens_are(real_checkpoints):
    tokenizer = Tokenizer.from_directory(real_checkpoints / "smollm2-135m-instruct")
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.special_ids == set(range(17))
    assert tokenizer.has_chat_template


@given(st.text())
def test_a_byte_level_vocabulary_gives_every_text_back(text):
    assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == text


@given(ids_of_tiny)
def test_the_bytes_of_tokens_joined_are_the_bytes_of_the_text(ids):
    joined = b"".join(map(tiny.token_bytes, ids))
    assert joined.decode("utf-8", "replace") == tiny.decode(ids, skip_special_tokens=False)


@given(ids_of_tiny)
def test_skipping_special_tokens_leaves_out_exactly_these(ids):
    kept = [token for token in ids if token not in tiny.special_ids]
    assert tiny.decode(ids) == tiny.decode(kept, skip_special_tokens=False)


@given(st.lists(st.text()))
def test_a_batch_equals_its_texts_alone(texts):
    assert tiny.encode_batch(texts) == [tiny.encode(text) for text in texts]


def test_threads_get_the_same_ids():
    texts = [f"the {n} and the {n * n}" for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tiny.encode, texts)) == tiny.encode_batch(texts)


def test_special_tokens_in_a_text_are_single_tokens():
    ids = tiny.encode("<|im_start|>the<|im_end|>")
    assert [tiny.token_text(token) for token in ids] == ["<|im_start|>", "the", "<|im_end|>"]
    assert {ids[0], ids[-1]} <= tiny.special_ids


def test_the_text_of_half_a_character_is_a_replacement_character():
    first, second = tiny.encode("é")
    assert (tiny.token_bytes(first), tiny.token_bytes(second)) == (b"\xc3", b"\xa9")
    assert tiny.token_text(first) == tiny.token_text(second) == "\ufffd"


@pytest.mark.parametrize("token", [-1, tiny.vocab_size, 10**9])
def test_an_id_beyond_the_vocabulary_has_no_text(token):
    assert tiny.token_bytes(token) == b""
    assert tiny.token_text(token) == ""


def test_word_tokens_spell_without_their_marks():
    tokenizer = Tokenizer.from_directory(TINY_ENCODER)
    ids = tokenizer.encode("cats", add_special_tokens=False)
    assert [tokenizer.token_bytes(token) for token in ids] == [b"cat", b"s"]


def test_special_tokens_are_added_unless_refused():
    tokenizer = Tokenizer.from_directory(TINY_ENCODER)
    inner = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == [2, *inner, 3]


@pytest.mark.parametrize("text", ["\ud800", "fine\udfffnot"])
def test_a_lone_surrogate_is_the_requests_fault(text):
    with pytest.raises(RequestError, match=r"lone surrogate U\+D"):
        tiny.encode(text)
    with pytest.raises(RequestError, match="lone surrogate"):
        tiny.encode_batch(["fine", text])


def copy_tiny(folder: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TINY / file).read_bytes())
    return folder


def test_no_text_is_cut_or_padded_even_if_the_file_asks_for_it(tmp_path):
    file = copy_tiny(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(file))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert [len(ids) for ids in tokenizer.encode_batch(["a", "a" * 9])] == [1, 9]


def test_the_checkpoints_own_eos_ids_count_too(tmp_path):
    folder = copy_tiny(tmp_path)
    (folder / "inferneo.json").write_text('{"eos_token_ids": [5, 7], "bos_token_id": 9}')
    tokenizer = Tokenizer.from_directory(folder)
    assert tokenizer.eos_token_ids == tiny.eos_token_ids | {5, 7}
    assert tokenizer.bos_token_id == tiny.bos_token_id
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_directory(folder)
    assert (bare.eos_token_ids, bare.bos_token_id) == ({5, 7}, 9)
    assert not bare.has_chat_template


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer.json", "{}", "model is None; it must be an object"),
        ("tokenizer.json", '{"model": {"vocab": {}, "type": "?"}}', "cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "holds []; it must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "neither a text nor a list"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "does not compile: line 1"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, file, content, says):
    folder = copy_tiny(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(TokenizerError, match=re.escape(says)):
        Tokenizer.from_directory(folder)


def test_a_text_is_cut_before_what_is_added_behind_it():
    bert = Tokenizer.from_directory(GOLDEN / "families" / "bert")
    ids = bert.encode("one two three four five six")
    first, last = ids[0], ids[-1]
    assert {first, last} <= bert.special_ids
    for most in range(3, len(ids) + 2):
        (cut,) = bert.encode_batch(["one two three four five six"], max_tokens=most)
        assert cut == (ids if most >= len(ids) else [*ids[: most - 1], last])
    bare = bert.encode("one two three four five six", add_special_tokens=False)
    assert bert.encode_batch(
        ["one two three four five six"], add_special_tokens=False, max_tokens=2
    ) == [bare[:2]]
