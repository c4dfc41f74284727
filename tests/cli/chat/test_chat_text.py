"""What a model writes cannot reach the terminal's controls, and words stay whole."""

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth
from rich.console import Console

from server.cli.bench.report import embedding_table, level_table
from server.cli.chat.screen import Wrapper
from server.cli.progress import ModelProgress
from server.observe.terminal import clean

PIECES = st.lists(st.text(max_size=8), max_size=8)
LETTERS = st.text("abcdefgh \n", max_size=200)


@given(st.text(st.characters(categories=["L", "C", "Z"])))
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    for character in clean(text):
        assert character in "\t\n" or unicodedata.category(character) != "Cc"
        order = unicodedata.bidirectional(character)
        assert order not in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    clean(text).encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\u241b[2J\u241b]0;title\u2407"),
        ("one\r\ntwo\rthree", "one\ntwothree"),
        ("\x1b]52;c;cm0gLXJm\x1b\\", "\u241b]52;c;cm0gLXJm\u241b\\"),
        ("\x9d8;;http://x\x9c\u2066\ud83d", "\ufffd8;;http://x\ufffd\ufffd\ufffd"),
        ("\x9b31m\x7f", "\ufffd31m\u2421"),
        ("na\u00efve \U0001f600", "na\u00efve \U0001f600"),
    ],
)
def test_controls_are_shown_and_text_is_left_alone(text: str, shown: str) -> None:
    assert clean(text) == shown


@given(PIECES)
def test_text_is_the_same_however_it_was_cut(pieces: list[str]) -> None:
    assert "".join(map(clean, pieces)) == clean("".join(pieces))
    cut, whole = Wrapper(12), Wrapper(12)
    cleaned = [clean(piece) for piece in pieces]
    assert "".join(map(cut.feed, cleaned)) == whole.feed("".join(cleaned))


def on_a_terminal(written: str) -> list[str]:
    """The lines that a terminal shows: it goes back at CSI D, and erases at CSI K."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[\d*[DK]|[\s\S]", written):
        if token.endswith("D") and len(token) > 1:
            column -= int(token[2:-1])
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif token == "\n":
            lines.append("")
            column = 0
        else:
            lines[-1] = lines[-1][:column] + token
            column += 1
    return lines


@given(LETTERS, st.integers(4, 20))
def test_lines_fit_and_words_are_whole_where_they_can_be(text: str, width: int) -> None:
    lines = on_a_terminal(Wrapper(width).feed(text))
    assert all(len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    if all(len(word) <= width for word in text.split()):
        assert " ".join(lines).split() == text.split()


def test_wide_characters_take_two_cells() -> None:
    lines = Wrapper(5).feed("\u4f60\u597d\u4e16\u754c").split("\n")
    assert [sum(map(get_cwidth, line)) for line in lines] == [4, 4]


@pytest.mark.parametrize("unit", ["\u0301", "a", "\u200b", "\u4f60", "a ", "\u202f"])
def test_the_work_of_wrapping_grows_with_the_text_and_no_faster(
    monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    work = 0

    def measured(text: str) -> int:
        nonlocal work
        work += len(text)
        return get_cwidth(text)

    monkeypatch.setattr("server.cli.chat.screen.get_cwidth", measured)
    wrapper = Wrapper(80)
    for _ in range(20_000):
        wrapper.feed(unit)
        assert len(wrapper._word) <= 1000
    assert work <= 20_000 * len(unit)


def test_progress_shows_no_control_of_a_server() -> None:
    hostile = "\x1b]52;c;cm0gLXJm\x1b\\\x9b31m\u202e"
    row = {"id": hostile, "stage": hostile, "done": 1, "total": 2}
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    with ModelProgress(console, lambda: [row, row | {"stage": "ready"}]):
        pass
    assert shown.getvalue().count("\u241b]52;c;cm0gLXJm\u241b") >= 2
    for character in ("\x1b]", "\x9b", "\u202e"):
        assert character not in shown.getvalue()


def test_tables_of_a_benchmark_show_no_control_of_a_server() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    for table in (level_table, embedding_table):
        console.print(table([], "\x1b]0;mine\x07 [bold]m[/x]"))
    assert shown.getvalue().count("\u241b]0;mine\u2407 [bold]m[/x]") == 2
