"""An ongoing conversation: it asks, shows answers, and keeps both."""

from collections.abc import Callable

from server.cli.chat.client import Answer, ChatError, KeyNeededError, Server
from server.cli.chat.dialogue import Dialogue
from server.cli.chat.screen import Screen


class Talk:
    """Asks a server, and keeps the questions and answers.

    Args:
        server: the server to ask.
        dialogue: the conversation so far.
        screen: the screen to write on.
        ask_key: asks the user for an API key; None if there is no user to ask.

    Attributes:
        dialogue: the current conversation.
        pending: a question that got no answer.
        forget: empties the line editor's history.
    """

    def __init__(
        self,
        server: Server,
        dialogue: Dialogue,
        screen: Screen,
        ask_key: Callable[[], str] | None = None,
    ) -> None:
        self.server, self.dialogue, self.screen = server, dialogue, screen
        self.pending: str | None = None
        self.forget: Callable[[], None] = lambda: None
        self._ask_key = ask_key

    def ask(self, question: str) -> None:
        """Ask, and write the answer as it arrives; an interrupted answer is kept, too."""
        self._ask(question, self.dialogue)

    def retry(self) -> None:
        """Ask the last question again. The old answer is kept until there is a new one.

        Raises:
            ChatError: there is no question.
        """
        if self.pending is not None:
            self._ask(self.pending, self.dialogue)
        elif self.dialogue.turns:
            self._ask(self.dialogue.turns[-1].question, self.dialogue.undone())
        else:
            raise ChatError("Nothing was asked yet.")

    def with_key(self, action: Callable[[], None]) -> None:
        """Run an action; if it needs an API key, ask for one and run it again.

        Raises:
            ChatError: the action fails, or no key was given.
        """
        while True:
            try:
                return action()
            except KeyNeededError as error:
                if self._ask_key is None:
                    raise
                self.screen.error(str(error))
                if not (key := self._ask_key()):
                    raise ChatError("Without an API key this server does not answer.") from None
                self.server.key = key

    def _ask(self, question: str, before: Dialogue) -> None:
        answer, replaces = Answer(), before is not self.dialogue
        if not replaces:
            self.pending = question
        try:
            self.with_key(lambda: self._stream(before.body(question), answer))
        except KeyboardInterrupt:
            answer.reason = "interrupt"
        except ChatError as error:
            self.screen.error(str(error))
            if answer.text:
                self.screen.note("What was said so far is kept; /retry asks again.")
        if answer.text or answer.reason not in (None, "interrupt"):
            self.dialogue, self.pending = before.having(question, answer.text), None
        if answer.reason:
            self.screen.figures(answer)

    def _stream(self, body: dict[str, object], answer: Answer) -> None:
        with self.screen.answer() as writer:
            for piece in self.server.stream(body, answer):
                if answer.reasoning and piece == answer.text:  # the first: the reasoning is whole
                    self.screen.warn(answer.reasoning)
                writer.write(piece)
