"""Grammars of answers in a model's own form: reasoning, then calls or the form that is asked for.

They are in llguidance's variant of Lark. What a tokenizer has as a marker is named by its id there,
since the same characters spelled by other tokens are not what the model was trained to write.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inferneo_jax import json_rule
from server.parsers.parser import Form, Format

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What an answer may hold beside the form that a request asks for.

    Attributes:
        tokenizer: the model's.
        format: how the model writes reasoning.
        thinking: whether the prompt has begun the reasoning.
        thinks: whether the answer may begin it otherwise.
        tools: the JSON schemas of the arguments of the tools that may be called, by name.
        form: how calls are written; None allows none.
        repeats: whether there may be several.
    """

    tokenizer: "Tokenizer"
    format: Format
    thinking: bool
    thinks: bool
    tools: Mapping[str, Mapping[str, Any]]
    form: Form | None
    repeats: bool
    _markers: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        texts = {tokenizer.token_text(token): token for token in tokenizer.marker_ids}
        object.__setattr__(self, "_markers", {t: i for t, i in texts.items() if t})

    def around(self, answer: str, *, lenient: bool) -> str:
        """Return the grammar of an answer.

        Args:
            answer: the form that is asked for, as the right side of a rule; empty: only calls.
            lenient: whether what cannot be enforced of the tools' schemas is ignored.
        """
        rules, options = dict[str, str](), [answer] if answer else []
        if self.form is not None and self.tools:
            options.append("calls")
            rules |= self._calls(self.form, lenient=lenient)
        start = options[0] if len(options) == 1 else f"({' | '.join(options)})"
        if self.format.thoughts and (self.thinking or self.thinks):
            begin, end = self.format.thoughts[0]
            rules["reasoning"] = "thoughts /[\\n ]{0,4}/"
            rules |= self._text_until("thoughts", end)
            opened = "reasoning" if self.thinking else f"({self._spelled(begin)} reasoning)?"
            start = f"{opened} {start}"
        rules = {"start": start, **rules}
        return "\n".join(f"{name}: {rule}" for name, rule in rules.items())

    def _calls(self, form: Form, *, lenient: bool) -> Iterator[tuple[str, str]]:
        """Yield the rules of calls."""
        parts = {name: self._spelled(text) for name, text in form._asdict().items()}
        again = f" ({parts['separator']} call)*" if self.repeats else ""
        yield "calls", " ".join((parts["begin"], "call" + again, parts["end"])).strip()
        names = " | ".join(f"tool_{i}" for i in range(len(self.tools)))
        yield "call", " ".join((parts["before"], f"({names})", parts["after"])).strip()
        for i, (name, schema) in enumerate(self.tools.items()):
            yield f"tool_{i}", f"{json.dumps(name)} {parts['between']} arguments_{i}"
            yield f"arguments_{i}", json_rule({"type": "object", **schema}, lenient=lenient)

    def _text_until(self, name: str, end: str) -> Iterator[tuple[str, str]]:
        """Yield the rule of any text up to the first ``end``, that included."""
        if end in self._markers:  # a marker is no text, so the text ends there by itself
            yield name, f"/(\\n|.)*/ {self._spelled(end)}"
        else:
            yield f"{name}[suffix={json.dumps(end)}]", "/(\\n|.)*/"

    def _spelled(self, text: str) -> str:
        """Return a text as terminals: markers by their id, all else as strings."""
        held = sorted((marker for marker in self._markers if marker in text), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, held))})", text) if held else [text]
        return " ".join(
            f"<[{self._markers[piece]}]>" if piece in self._markers else json.dumps(piece)
            for piece in pieces
            if piece
        )
