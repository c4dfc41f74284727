"""The state of a conversation, and the requests made from it."""

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
"""Parameters that the chat sets itself, or does not use."""
PARAMETERS = tuple(sorted(ChatBody.model_fields.keys() - _FIXED))


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        model: the id of the model that answers.
        system: the system message; empty for none.
        turns: the questions and answers so far.
        parameters: sampling parameters by name; at first, a temperature that suits small models.
    """

    model: str
    system: str = ""
    turns: tuple[Turn, ...] = ()
    parameters: dict[str, Any] = field(default_factory=lambda: dict(BEGINNING))

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """Return the messages in the API's form, with a further question at the end."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer})
        return found if question is None else [*found, {"role": "user", "content": question}]

    def body(self, question: str | None = None) -> dict[str, Any]:
        """Return the body of a request."""
        return {"model": self.model, "messages": self.messages(question), **self.parameters}

    def having(self, question: str, answer: str) -> "Dialogue":
        """Return the dialogue with a further turn."""
        return replace(self, turns=(*self.turns, Turn(question, answer)))

    def undone(self) -> "Dialogue":
        """Return the dialogue without its last turn."""
        return replace(self, turns=self.turns[:-1])

    def setting(self, name: str, text: str) -> "Dialogue":
        """Return the dialogue with a parameter set to ``text``: JSON, plain text, or ``default``.

        Raises:
            ChatError: there is no such parameter, or the API would reject the value.
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
    """Validate a body as the server would.

    Raises:
        ChatError: the server would reject it, with this message.
    """
    try:
        return ChatBody.model_validate(body)
    except ValidationError as error:
        raise ChatError(describe(error.errors(include_url=False)[0])) from None
