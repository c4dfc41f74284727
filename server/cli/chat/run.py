"""``inferneo chat``: finds or starts a server, and runs the conversation."""

import contextlib
import getpass
import os
import sys
from dataclasses import dataclass

from server.cli.chat import commands
from server.cli.chat.client import Answer, ChatError, NoServerError, Server
from server.cli.chat.dialogue import Dialogue
from server.cli.chat.editor import Editor, history_file
from server.cli.chat.local import local_server, waiting
from server.cli.chat.screen import Screen, terminal
from server.cli.chat.talk import Talk
from server.config.schema import KEY_VARIABLE
from server.config.settings import Settings
from server.process.listening import url_of

_FAILED, _INTERRUPTED = 1, 130


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The options of the command line; see ``server.cli.chat.cli.chat``."""

    model: str | None = None
    url: str | None = None
    message: str | None = None
    system: str = ""
    parameters: list[str]


def run(wish: Wish) -> None:
    """Chat, or ask one question.

    Raises:
        ConfigError: the settings, which say where the server is, are invalid.
        SystemExit: the chat failed, with 1, or Ctrl-C ended it, with 130.
    """
    screen = terminal()
    alone = wish.message is None and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        with contextlib.ExitStack() as stack:
            server = _server(wish, screen, stack)
            talk = Talk(server, Dialogue(model=""), screen, _ask_key if alone else None)
            talk.dialogue = _dialogue(wish, talk)
            if alone:
                converse(talk, Editor(history_file()))
            else:
                _answer(talk, sys.stdin.read() if wish.message is None else wish.message)
    except ChatError as error:
        screen.error(str(error))
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def converse(talk: Talk, editor: Editor) -> None:
    """Read questions and answer them until the user leaves."""
    talk.forget = editor.forget
    talk.screen.note(f"{talk.dialogue.model} at {talk.server.url}. /help shows what there is.")
    while True:
        try:
            line = editor.read()
            if line.strip() and not commands.run(line, talk):
                talk.ask(line)
        except ChatError as error:
            talk.screen.error(str(error))
        except KeyboardInterrupt:
            talk.screen.note("Ctrl-D leaves.")
        except (EOFError, commands.Leave):
            return


def _answer(talk: Talk, question: str) -> None:
    """Ask one question; only its answer goes to standard output."""
    if not question.strip():
        raise ChatError("There is no question: standard input, or --message, is empty.")
    answer = Answer()
    with talk.screen.answer() as writer:
        for piece in talk.server.stream(talk.dialogue.body(question), answer):
            writer.write(piece)
    for warning in answer.warnings:
        talk.screen.warn(f"The server: {warning}")
    if answer.reason == "length":
        talk.screen.warn("The answer is cut: max_tokens, or the model's context, is used up.")


def _server(wish: Wish, screen: Screen, stack: contextlib.ExitStack) -> Server:
    """Return the named server or the one on this machine, which is started if there is none.

    Raises:
        ChatError: no server answers at the named address, or it cannot be started.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if wish.url is not None:
        return _ready(Server(wish.url, key), screen)
    settings = Settings.load()
    server = Server(url_of(settings.host, settings.port), key)
    try:
        return _ready(server, screen)
    except NoServerError:
        screen.warn(f"No server answers at {server.url}: one is started for this chat.")
    return stack.enter_context(local_server(wish.model, settings, screen.err))


def _ready(server: Server, screen: Screen) -> Server:
    """Wait until the server's models are loaded, and return it.

    Raises:
        ChatError: the server does not answer.
    """
    server.greet()
    for _ in waiting(server, screen.err, started=True):
        pass
    return server


def _dialogue(wish: Wish, talk: Talk) -> Dialogue:
    """Return an empty conversation, with the options of the command line.

    Raises:
        ChatError: there is no such model or parameter.
    """
    found: list[str] = []
    talk.with_key(lambda: found.extend(talk.server.models()))
    model = wish.model
    if model is None or talk.server.started_here:
        if not found:
            raise ChatError(f"{talk.server.url} has no model that chats.")
        model = found[0]
    elif model not in found:
        talk.server.check(model)
    dialogue = Dialogue(model=model, system=wish.system)
    for parameter in wish.parameters:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise ChatError(f"--set {parameter} is to be NAME=VALUE, such as temperature=0.7.")
        dialogue = dialogue.setting(name.strip(), value)
    return dialogue


def _ask_key() -> str:
    return getpass.getpass("API key: ").strip()
