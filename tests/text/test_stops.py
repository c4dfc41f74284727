import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferneo_jax.errors import RequestError
from inferneo_jax.text.stops import StopMatcher

ALPHABET = "ab]^"  # few letters, so that stops occur; two that mean something in expressions
texts = st.text(ALPHABET, max_size=30)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)
pieces = st.lists(st.text(ALPHABET, max_size=6), max_size=12)


def by_hand(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop that completes first, found by trying every end."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(pieces, stop_lists, st.booleans())
@example(["aab"], ["ab", "b", "aab"], False)
@example(["a", "a", "b"], ["aaa", "ab"], False)
def test_the_stop_that_completes_first_wins_however_the_text_is_cut(cut, stops, include):
    matcher = StopMatcher(stops, include=include)
    shown = "".join(map(matcher.push, cut)) + matcher.flush()
    assert (shown, matcher.matched) == by_hand("".join(cut), stops, include)


@given(pieces, stop_lists)
def test_no_more_is_held_back_than_may_begin_a_stop(cut, stops):
    matcher = StopMatcher(stops)
    taken = shown = ""
    for piece in cut:
        taken += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            break
        ends = (taken[start:] for start in range(len(taken) + 1))
        longest = next(end for end in ends if any(stop.startswith(end) for stop in ["", *stops]))
        assert shown + longest == taken


@given(texts, stop_lists, texts)
def test_after_a_match_nothing_more_is_shown(text, stops, later):
    matcher = StopMatcher([*stops, "]^"])
    matcher.push(text + "]^")
    found = matcher.matched
    assert found is not None
    assert matcher.push(later) == matcher.flush() == ""
    assert matcher.matched == found


@given(texts)
def test_without_stops_everything_is_shown_at_once(text):
    matcher = StopMatcher([])
    assert matcher.push(text) == text
    assert matcher.flush() == ""


def test_flushing_shows_held_text_once():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Bye.\n\nUs") == "Bye."
    assert matcher.flush() == "\n\nUs"
    assert matcher.flush() == ""


def test_an_empty_stop_is_the_requests_fault():
    with pytest.raises(RequestError, match="empty string") as caught:
        StopMatcher(["a", ""])
    assert caught.value.param == "stop"
