"""The line editor: history, keys and completions."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from server.cli.chat.commands import COMMANDS
from server.cli.chat.dialogue import PARAMETERS


def history_file() -> Path:
    """Return the file that keeps the questions, in the user's state folder."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "inferneo" / "chat_history"


class Editor:
    """Reads questions and commands.

    Enter sends; Alt-Enter, or Enter after a backslash, begins another line. Pasted text may have
    several lines.

    Args:
        file: the file of the history, which only the user can read. If it cannot be written, the
            history is kept for this conversation only.
        source, output: used instead of the terminal.
    """

    def __init__(
        self, file: Path, source: Input | None = None, output: Output | None = None
    ) -> None:
        self._file = file
        self._session: PromptSession[str] = PromptSession(
            message=[("bold ansicyan", "> ")],
            prompt_continuation=[("ansicyan", "  ")],
            multiline=True,
            history=self._history(),
            key_bindings=_keys(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            input=source,
            output=output,
        )

    def read(self) -> str:
        """Return what the user typed.

        Raises:
            EOFError: Ctrl-D, on an empty line.
            KeyboardInterrupt: Ctrl-C.
        """
        return self._session.prompt()

    def forget(self) -> None:
        """Clear the history, in memory and on disk."""
        with contextlib.suppress(OSError):
            self._file.unlink()
        self._session.history = self._session.default_buffer.history = self._history()

    def _history(self) -> History:
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600))
            self._file.chmod(0o600)
        except OSError:
            return InMemoryHistory()
        return FileHistory(self._file)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        if before.endswith("\\") and buffer.document.is_cursor_at_the_end_of_line:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class CommandCompleter(Completer):
    """Completes names of commands, and of parameters after ``/set``."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions for Tab."""
        text = document.text_before_cursor
        if text.startswith("/set "):
            words, start = PARAMETERS, text.removeprefix("/set ")
        elif text.startswith("/"):
            words, start = tuple(f"/{name}" for name in COMMANDS), text
        else:
            return
        for word in words:
            if word.startswith(start):
                yield Completion(word, -len(start))
