"""What was said, and what goes with it to the server."""

import difflib
import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from server.api.openai.chat import ChatBody
from server.cli.chat import BEGINNING
from server.cli.chat.client import ChatError
from server.config.validation import describe

_FIXED = frozenset(
    [
        "add_generation_prompt",
        "continue_final_message",
        "logprobs",
        "messages",
        "metadata",
        "model",
        "n",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "top_logprobs",
        "user",
    ]
)
"""Parameters that a chat has its own values for, or no use."""
PARAMETERS = tuple(sorted(ChatBody.model_fields.keys() - _FIXED))


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        model: that answers.
        system: what it is told before all else; empty: nothing.
        turns: the questions and answers so far.
        parameters: of sampling, by their names; they begin with a temperature for small models.
    """

    model: str
    system: str = ""
    turns: tuple[Turn, ...] = ()
    parameters: dict[str, Any] = field(default_factory=lambda: dict(BEGINNING))

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """As the API has them, a further question at the end."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return found if question is None else [*found, {"role": "user", "content": question}]

    def body(self, question: str | None = None) -> dict[str, Any]:
        """A request."""
        return {"model": self.model, "messages": self.messages(question), **self.parameters}

    def having(self, question: str, answer: str) -> "Dialogue":
        """With a further turn."""
        return replace(self, turns=(*self.turns, Turn(question, answer)))

    def undone(self) -> "Dialogue":
        """Without the last turn."""
        return replace(self, turns=self.turns[:-1])

    def setting(self, name: str, text: str) -> "Dialogue":
        """With a parameter; ``text`` is JSON, or a string as it is, or ``default``.

        Raises:
            ChatError: there is no such parameter, or the API would refuse the value.
        """
        if name not in PARAMETERS:
            close = difflib.get_close_matches(name, PARAMETERS, n=1)
            known = f"did you mean {close[0]}?" if close else f"there are {', '.join(PARAMETERS)}."
            raise ChatError(f"{name!r} cannot be set; {known}")
        parameters = {key: value for key, value in self.parameters.items() if key != name}
        if text != "default":
            try:
                parameters[name] = json.loads(text)
            except ValueError:
                parameters[name] = text
        changed = replace(self, parameters=parameters)
        validated(changed.body("?"))
        return changed


def validated(body: Any) -> ChatBody:
    """A body as the server would read it.

    Raises:
        ChatError: it would refuse it, with these words.
    """
    try:
        return ChatBody.model_validate(body)
    except ValidationError as error:
        raise ChatError(describe(error.errors(include_url=False)[0])) from None
