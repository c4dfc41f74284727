import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferneo_jax.errors import TokenizerError
from inferneo_jax.text.detokenize import IncrementalDecoder
from inferneo_jax.text.tokenizer import Tokenizer
from tests.support.paths import FAMILIES

tiny = Tokenizer.from_directory(FAMILIES / "llama-tied")

some_ids = st.lists(st.integers(0, tiny.vocab_size + 5))
pieces_of_characters = st.binary().map(
    lambda data: [tiny.encode(bytes([byte]).decode("latin-1"))[-1] for byte in data]
)


@given(some_ids | pieces_of_characters, st.booleans())
def test_streamed_text_equals_plain_text(ids, skip):
    decoder = IncrementalDecoder(tiny, skip_special_tokens=skip)
    streamed = "".join(map(decoder.push, ids)) + decoder.flush()
    assert streamed == tiny.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_no_push_shows_a_part_of_a_character(text):
    decoder = IncrementalDecoder(tiny, skip_special_tokens=False)
    shown = ""
    for token in tiny.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


@given(st.characters(exclude_categories=["Cs"]))
def test_a_character_is_shown_with_its_last_byte(character):
    decoder = IncrementalDecoder(tiny)
    *open_ones, last = tiny.encode(character)
    assert [decoder.push(token) for token in open_ones] == [""] * len(open_ones)
    assert decoder.push(last) == character


def test_a_character_left_open_becomes_a_replacement_character():
    decoder = IncrementalDecoder(tiny)
    first, _ = tiny.encode("é")
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.real
def test_the_real_models_tokens_stream_as_they_decode(real_checkpoints):
    tokenizer = Tokenizer.from_directory(real_checkpoints / "smollm2-135m-instruct")
    ids = [n * 7919 % (tokenizer.vocab_size + 3) for n in range(20_000)]
    for skip in (True, False):
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_word_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="cannot decode a stream"):
        IncrementalDecoder(Tokenizer.from_directory(FAMILIES / "bert"))
