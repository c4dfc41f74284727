"""Conversations in files: JSON, which is a request of the API, or Markdown, which is for people."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import orjson

from server.cli.chat.client import ChatError
from server.cli.chat.dialogue import PARAMETERS, Dialogue, Turn, validated
from server.observe.terminal import clean

_TITLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_ROLES = {title: role for role, title in _TITLES.items()}
_OURS = "## (?:System|User|Assistant)"
_HEADING = re.compile(r"^## (System|User|Assistant)\n\n", re.MULTILINE)
_HIDDEN = re.compile(rf"^\\(\\*{_OURS})$", re.MULTILINE)
"""Matches such a line within a message, which is written with a backslash before it."""


def save(dialogue: Dialogue, path: Path) -> None:
    """Write a conversation to a new file that only the user can read; the suffix sets the format.

    Raises:
        ChatError: the file exists or cannot be written, or its suffix is neither ``.json`` nor
            ``.md``.
    """
    if _is_json(path):
        text = json.dumps(dialogue.body(), ensure_ascii=False, indent=2) + "\n"
    else:
        parts = [
            f"## {_TITLES[message['role']]}\n\n{_escaped(clean(message['content']))}\n\n"
            for message in dialogue.messages()
        ]
        text = f"# Conversation with {clean(dialogue.model)}\n\n" + "".join(parts)
    try:
        # An existing file is left unchanged, even a dangling link.
        with open(path, "x", encoding="utf-8", opener=_private) as file:
            file.write(text)
    except FileExistsError:
        raise ChatError(f"{path} is there already; name another file.") from None
    except OSError as error:
        raise ChatError(f"{path} cannot be written: {error.strerror}.") from None


def load(path: Path, dialogue: Dialogue) -> tuple[Dialogue, str | None]:
    """Read a conversation, and the unanswered question at its end; the model stays the same.

    Raises:
        ChatError: the file cannot be read, or holds no conversation.
    """
    as_json = _is_json(path)
    try:
        text = path.read_text(encoding="utf-8")
        body = orjson.loads(text) if as_json else {"messages": _messages(text)}
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ChatError(f"{path} holds no conversation: {error}.") from None
    if isinstance(body, dict):
        body |= {"model": dialogue.model}
    found = validated(body)
    messages = [(message["role"], message.get("content") or "") for message in found.messages]
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    for i, (role, _) in enumerate(messages):
        if role != (expected := ("user", "assistant")[i % 2]):
            raise ChatError(f"{path}: message {i + 1} is of {role}, where {expected} is to speak.")
    texts = [content for _, content in messages]
    read = replace(
        dialogue,
        system=system,
        turns=tuple(map(Turn, texts[::2], texts[1::2])),
        parameters={name: body[name] for name in PARAMETERS if name in body}
        if as_json
        else dialogue.parameters,
    )
    return read, texts[-1] if len(texts) % 2 else None


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".md"):
        raise ChatError(f"{path} ends in neither .json nor .md, which say how it is written.")
    return path.suffix == ".json"


def _escaped(text: str) -> str:
    """Escape the lines that would be read as one of our headings."""
    return re.sub(rf"^(\\*{_OURS})$", r"\\\1", text, flags=re.MULTILINE)


def _messages(text: str) -> list[dict[str, str]]:
    _, *parts = _HEADING.split(text)
    return [
        {
            "role": _ROLES[title],
            "content": _HIDDEN.sub(r"\1", content.removesuffix("\n\n")),
        }
        for title, content in zip(parts[::2], parts[1::2], strict=True)
    ]
