"""The commands of a chat: lines that begin with ``/``."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from server.cli.chat import files
from server.cli.chat.client import ChatError
from server.cli.chat.dialogue import PARAMETERS
from server.cli.chat.talk import Talk


class Leave(Exception):  # noqa: N818 - not an error
    """Raised to end the conversation."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        usage: the arguments after its name.
        text: a description.
        run: runs the command with the rest of the line.
    """

    usage: str
    text: str
    run: Callable[[Talk, str], None]


def run(line: str, talk: Talk) -> bool:
    """Run a line if it is a command, and return whether it is. A path such as ``/etc`` is not.

    Raises:
        ChatError: the command fails.
        Leave: the user ends the conversation.
    """
    match = re.fullmatch(r"/([a-z?]+)(?:\s+(.*))?", line.strip(), re.DOTALL)
    if match is None:
        return False
    if (command := COMMANDS.get(match[1])) is None:
        raise ChatError(f"There is no command /{match[1]}; /help shows those that there are.")
    command.run(talk, (match[2] or "").strip())
    return True


def _help(talk: Talk, _: str) -> None:
    shown = {
        f"/{name} {command.usage}".rstrip(): command.text for name, command in COMMANDS.items()
    }
    width = max(map(len, shown))
    talk.screen.show("\n".join(f"{usage:<{width}}  {text}" for usage, text in shown.items()))
    talk.screen.note(
        "Alt-Enter, or \\ at the end of a line, begins another line. Ctrl-C stops an answer; "
        "Ctrl-D leaves."
    )


def _system(talk: Talk, text: str) -> None:
    if text:
        talk.dialogue = replace(talk.dialogue, system="" if text == '""' else text)
    talk.screen.note(f"System: {talk.dialogue.system or 'nothing'}")


def _set(talk: Talk, text: str) -> None:
    name, _, value = text.partition(" ")
    if value:
        talk.dialogue = talk.dialogue.setting(name, value.strip())
    elif name:
        raise ChatError(f"/set {name} needs a value; default takes it back.")
    found = talk.dialogue.parameters
    shown = ", ".join(f"{name} {json.dumps(value)}" for name, value in found.items())
    talk.screen.note(f"Set: {shown or 'nothing. There are ' + ', '.join(PARAMETERS)}")


def _model(talk: Talk, name: str) -> None:
    if name:
        talk.with_key(lambda: talk.server.check(name))
        talk.dialogue = replace(talk.dialogue, model=name)
        talk.screen.note(f"Model: {name}")
        return
    found: list[str] = []
    talk.with_key(lambda: found.extend(talk.server.models()))
    for each in found:
        talk.screen.show(f"{'*' if each == talk.dialogue.model else ' '} {each}")


def _retry(talk: Talk, _: str) -> None:
    talk.retry()


def _undo(talk: Talk, _: str) -> None:
    if talk.pending is not None:
        taken, talk.pending = talk.pending, None
    elif talk.dialogue.turns:
        taken = talk.dialogue.turns[-1].question
        talk.dialogue = talk.dialogue.undone()
    else:
        raise ChatError("Nothing was said yet.")
    talk.screen.note(f"Taken back: {taken}")


def _clear(talk: Talk, _: str) -> None:
    talk.dialogue, talk.pending = replace(talk.dialogue, turns=()), None
    talk.screen.note("All that was said is forgotten; /system and /set hold.")


def _save(talk: Talk, name: str) -> None:
    path = _path(name)
    files.save(talk.dialogue, path)
    talk.screen.note(f"Saved: {path}")


def _load(talk: Talk, name: str) -> None:
    talk.dialogue, talk.pending = files.load(_path(name), talk.dialogue)
    count = len(talk.dialogue.turns)
    talk.screen.note(f"Loaded: {count} turn{'s' * (count != 1)}")
    if talk.pending is not None:
        talk.screen.note("The last question has no answer; /retry asks it.")


def _path(name: str) -> Path:
    if not name:
        raise ChatError("Name a file that ends in .md or .json.")
    return Path(name).expanduser()


def _forget(talk: Talk, _: str) -> None:
    talk.forget()
    talk.screen.note("The arrow keys know none of your earlier questions any more.")


def _leave(_: Talk, __: str) -> None:
    raise Leave


COMMANDS = {
    "help": Command("", "show this", _help),
    "system": Command("TEXT", 'what the model is told before all else; "" for nothing', _system),
    "set": Command("NAME VALUE", "a parameter, as temperature 0.7; default takes it back", _set),
    "model": Command("[NAME]", "show the models, or go on with another", _model),
    "retry": Command("", "ask the last question again", _retry),
    "undo": Command("", "take back the last question and its answer", _undo),
    "clear": Command("", "forget what was said", _clear),
    "save": Command("FILE", "write it to FILE.md, to read, or FILE.json, a request", _save),
    "load": Command("FILE", "go on with what was saved", _load),
    "forget": Command("", "empty the history of the arrow keys", _forget),
    "exit": Command("", "leave, as Ctrl-D does", _leave),
}
"""The commands, by name."""
