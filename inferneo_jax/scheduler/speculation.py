"""Drafts of what a sequence may go on with, looked up in the sequence itself. Plain Python.

Text often repeats what it has said: names, quotations, code. So the tokens that followed when the
newest few came before are a draft, which one step verifies in the time of hardly more than one
token (prompt look-up: Saxena 2023; Leviathan et al., arXiv:2211.17192). What is accepted is what
sampling gives without a draft: a draft proposes one token with certainty, so that accepting it when
it is the one that is drawn is the rejection sampling of the paper.
"""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

_SIZES = (3, 2)
"""Tokens that must have come before, the longer the better."""
_LEARNING = 0.25
_REST, _LONGEST_REST = 8, 256


class NGrams:
    """What came after each n-gram of a growing sequence, the last time that something did."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._read = 0

    def draft(self, tokens: Tokens[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow; ``tokens`` are those of the last call, and more.

        Where the sequence ends the draft goes on with itself: what repeats, repeats.
        """
        for end in range(max(self._read, 1), len(tokens)):
            for size in _SIZES:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        for size in _SIZES:
            found = self._after.get(tuple(tokens[-size:]))
            if found is not None and len(tokens) >= size:
                draft: list[int] = []
                for place in range(found, found + most):
                    known = place < len(tokens)
                    draft.append(tokens[place] if known else draft[place - len(tokens)])
                return draft
        return []


@dataclass(frozen=True)
class Drafts:
    """How drafts are made.

    Attributes:
        most: tokens of one.
        rows: most rows of a step that verifies some.
        cost: of such a step, in plain ones; 0 where drafts are made whatever they cost.
    """

    most: int
    rows: int
    cost: float = 0.0


@dataclass(slots=True)
class Luck:
    """How well a sequence's drafts do, and whether to make one.

    Attributes:
        accepted: tokens of a draft that are accepted, on average.
        rest: tokens for which no draft is made.
    """

    accepted: float = 2.0
    rest: int = 0
    _rests: int = 0

    def learn(self, drafted: int, accepted: int, cost: float) -> None:
        """Note what came of a draft.

        When they are not worth their cost, none is made for a while, and longer each time.
        """
        self.accepted += _LEARNING * (accepted - self.accepted)
        if accepted == drafted:
            self._rests = 0
        if 1 + self.accepted < cost:
            self.rest = min(_REST << self._rests, _LONGEST_REST)
            self._rests += 1
            self.accepted = cost  # one more try, then


@dataclass(slots=True)
class Drafting:
    """A sequence's drafts: where they come from, and how they did."""

    ngrams: NGrams = field(default_factory=NGrams)
    luck: Luck = field(default_factory=Luck)


def accepted(draft: Tokens[int], sampled: Tokens[int]) -> list[int]:
    """The tokens that a step brought: as much of the draft as was sampled too, and one more."""
    count = 0
    while count < len(draft) and draft[count] == sampled[count]:
        count += 1
    return [*sampled[: count + 1]]
