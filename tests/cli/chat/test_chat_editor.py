"""What is typed is what is asked."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from server.cli.chat.dialogue import Turn
from server.cli.chat.editor import CommandCompleter, Editor, history_file
from server.cli.chat.run import converse
from tests.cli.chat.chats import talk_to
from tests.support.fake_server import REPLY, Rig

ALT_ENTER = "\x1b\r"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@contextmanager
def typing(file: Path, text: str) -> Iterator[Editor]:
    source: PipeInput
    with create_pipe_input() as source:
        source.send_text(text)
        yield Editor(file, source, DummyOutput())


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("Hello?\r", "Hello?"),
        (f"one{ALT_ENTER}two\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("back\\slash\r", "back\\slash"),
        (f"{PASTE}one\r\ntwo\n{PASTED} three\r", "one\ntwo\n three"),
    ],
)
def test_enter_sends_and_lines_can_be_several(tmp_path: Path, typed: str, read: str) -> None:
    with typing(tmp_path / "history", typed) as editor:
        assert editor.read() == read


def test_history_is_kept_for_its_owner_until_it_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "state" / "history"
    with typing(file, "One?\r") as editor:
        editor.read()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with typing(file, "Two?\rThree?\r") as editor:
        editor.read()
        assert [*FileHistory(file).load_history_strings()] == ["Two?", "One?"]
        editor.forget()
        assert file.read_text() == ""
        editor.read()
    assert [*FileHistory(file).load_history_strings()] == ["Three?"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_without_a_folder_to_write_there_is_still_a_chat(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with typing(tmp_path / "file" / "history", "One?\rTwo?\r") as editor:
        assert [editor.read(), editor.read()] == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/he", {"/help"}),
        ("/set temp", {"temperature"}),
        ("/s", {"/save", "/set", "/system"}),
        ("he", set()),
    ],
)
def test_commands_and_parameters_are_completed(typed: str, offered: set[str]) -> None:
    found = CommandCompleter().get_completions(Document(typed), CompleteEvent())
    assert {completion.text for completion in found} == offered


def test_the_history_is_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/inferneo/chat_history")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file() == Path.home() / ".local" / "state" / "inferneo" / "chat_history"


def test_a_conversation_goes_on_until_ctrl_d(rig: Rig, tmp_path: Path) -> None:
    talk = talk_to(rig.url)
    typed = "Hello?\r\r/hepl\r/set top_k 5\r/forget\rabc\x03And?\r\x04"
    with typing(tmp_path / "history", typed) as editor:
        converse(talk, editor)
    assert talk.dialogue.turns == (Turn("Hello?", REPLY), Turn("And?", REPLY))
    assert talk.dialogue.parameters["top_k"] == 5
    assert "no command /hepl" in talk.screen.complaints
    assert "Ctrl-D leaves" in talk.screen.text
    assert (tmp_path / "history").read_text().count("\n+") == 1
