"""What was saved is what is loaded."""

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.openai.chat import ChatBody
from server.cli.chat import files
from server.cli.chat.client import ChatError
from server.cli.chat.dialogue import Dialogue, Turn
from server.observe.terminal import clean
from tests.support.fake_server import CHAT

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["## User", "\\## User\n", "## Assistant\n\nme", "\n\n", " ## System\n\n"]),
)
TURNS = st.lists(st.builds(Turn, TEXT, TEXT), min_size=1, max_size=3)
each_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def new(path: Path) -> Path:
    """A path where nothing is, of the example before it either."""
    path.unlink(missing_ok=True)
    return path


@each_example
@given(TEXT, TURNS)
def test_json_is_a_request_that_holds_it_all(
    tmp_path: Path, system: str, turns: list[Turn]
) -> None:
    dialogue = Dialogue(CHAT, system, tuple(turns), {"temperature": 0.5, "stop": ["END"]})
    path = new(tmp_path / "chat.json")
    files.save(dialogue, path)
    assert ChatBody.model_validate(json.loads(path.read_text("utf-8"))).unknown() == []
    assert files.load(path, Dialogue(CHAT)) == (dialogue, None)


@each_example
@given(TEXT, TURNS)
def test_markdown_holds_what_was_shown(tmp_path: Path, system: str, turns: list[Turn]) -> None:
    path = new(tmp_path / "chat.md")
    files.save(Dialogue(CHAT, system, tuple(turns)), path)
    shown = tuple(Turn(clean(turn.question), clean(turn.answer)) for turn in turns)
    assert files.load(path, Dialogue(CHAT)) == (Dialogue(CHAT, clean(system), shown), None)


def test_a_question_without_an_answer_is_left_to_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text('{"messages": [{"role": "user", "content": "Why?"}], "top_k": 5}')
    dialogue, pending = files.load(path, Dialogue(CHAT))
    assert (dialogue.turns, dialogue.parameters, pending) == ((), {"top_k": 5}, "Why?")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "ends in neither .json nor .md"),
        ("a.json", "{", "holds no conversation"),
        ("a.json", "[]", "must be an object"),
        ("a.json", '{"messages": []}', "at least one message"),
        ("a.md", "Hello", "at least one message"),
        ("a.json", "[" * 200_000, "holds no conversation"),
        ("a.json", "1" * 5000, "holds no conversation"),
        (
            "a.json",
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "holds no conversation",
        ),
        ("a.json", '{"messages": [{"role": "tool", "content": "1"}]}', "message 1 is of tool"),
        ("missing.md", None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_conversation_says_why(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ChatError, match=message):
        files.load(path, Dialogue(CHAT))


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="cannot be written: No such file"):
        files.save(Dialogue(CHAT), tmp_path / "none" / "chat.md")


@pytest.mark.parametrize("name", ["chat.json", "chat.md"])
def test_a_conversation_is_written_for_nobody_else_and_over_nothing(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    before = os.umask(0)
    try:
        files.save(Dialogue(CHAT), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = path.read_bytes()
    link = tmp_path / f"link-{name}"
    link.symlink_to(tmp_path / "nothing")
    for there in (path, link):
        with pytest.raises(ChatError, match="is there already; name another file"):
            files.save(Dialogue("other"), there)
    assert path.read_bytes() == written
    assert not (tmp_path / "nothing").exists()
