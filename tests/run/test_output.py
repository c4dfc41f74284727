"""Laws of one choice's text, whatever the tokens and however they came."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferneo_jax import GenerationOutput
from server.prompt.prompts import Prompt
from server.run.output import OutputProcessor, TextOptions, TextPart
from tests.support.fake_engine import logprob_of
from tests.support.fake_server import make_tokenizer

TOKENIZER = make_tokenizer()
PROMPT = Prompt(ids=(1,), max_tokens=100)
texts = st.text(st.sampled_from("abEND\u00e9\U0001f600 "), max_size=30)


def events_of(ids: list[int], cuts: list[int], options: TextOptions) -> list[TextPart]:
    """Feed ``ids`` in pieces of the sizes ``cuts``, the last with what is left."""
    choice = OutputProcessor(0, TOKENIZER, PROMPT, options)
    events, rest = [], ids
    for size in [*cuts, len(ids)]:
        piece, rest = rest[:size], rest[size:]
        output = GenerationOutput(
            token_ids=tuple(piece),
            logprobs=tuple(logprob_of(token, 1) for token in piece),
            finish_reason=None if rest else "length",
        )
        choice.feed(output)
        if event := choice.take():
            events.append(event)
        if choice.finish_reason:
            break
    return events


@given(
    texts,
    st.lists(st.integers(1, 5), max_size=12),
    st.lists(st.text(st.sampled_from("abEND\u00e9 "), min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_text_and_tokens_do_not_depend_on_the_cuts(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    options = TextOptions(stops=tuple(stops), include_stop=include, logprobs=True)
    one_by_one = events_of(ids, [1] * len(ids), options)
    cut = events_of(ids, cuts, options)
    assert "".join(e.text for e in cut) == "".join(e.text for e in one_by_one)
    tokens = [token for e in cut for token in e.tokens]
    assert tokens == [token for e in one_by_one for token in e.tokens]
    assert cut[-1].finish_reason == one_by_one[-1].finish_reason
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(e.text for e in cut) == text
        assert len(tokens) == len(ids)
    else:
        assert cut[-1].finish_reason == "stop"
        shown = "".join(e.text for e in cut)
        assert text.startswith(shown)
        assert len(shown) <= min(ends)
        assert all(token.offset <= len(shown) for token in tokens)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=30))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    events = events_of(ids, [1] * len(ids), TextOptions(logprobs=True))
    assert "".join(e.text for e in events) == TOKENIZER.decode(ids)
    assert sum(len(e.tokens) for e in events) == len(ids)


@pytest.mark.parametrize("cancelled", [False, True])
def test_nothing_counts_after_the_end(cancelled: bool) -> None:
    choice = OutputProcessor(0, TOKENIZER, PROMPT, TextOptions(stops=("b",)))
    choice.feed(GenerationOutput(token_ids=tuple(TOKENIZER.encode("a"))))
    if cancelled:
        choice.cancel()
    choice.feed(GenerationOutput(token_ids=tuple(TOKENIZER.encode("bcd"))))
    assert choice.num_tokens == (1 if cancelled else 2)
    event = choice.take()
    assert event is not None
    assert (event.text, event.finish_reason) == ("a", "abort" if cancelled else "stop")
    assert choice.finish_reason is not None


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_stop_takes_the_tokens_that_began_its_character_with_it(size: int) -> None:
    ids = TOKENIZER.encode("ab\U0001f600", add_special_tokens=False)
    options = TextOptions(stops=("\U0001f600",), logprobs=True)
    events = events_of(ids, [size] * 9, options)
    assert "".join(event.text for event in events) == "ab"
    assert [token.name for event in events for token in event.tokens] == ["a", "b"]
