"""Speculative decoding: drafts of what a sequence may go on with, and whether they pay. No device.

Text often repeats what it has said: names, quotations, code. So the tokens that followed when the
newest few came before are a draft, which one step verifies in hardly more time than one token takes
(prompt look-up: Saxena 2023; Leviathan et al., arXiv:2211.17192). Drafts never change which tokens
are sampled: a draft proposes each token with certainty, so accepting the one that is drawn anyway
is the rejection sampling of the paper.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from inferneo_jax.scheduler.sequence import Sequence

_NGRAM_SIZES = (3, 2)
"""Number of newest tokens that must have come before; the longer match is preferred."""
_INDEXED_PER_STEP = 1024
"""Tokens that one call indexes at most: a long prompt must not hold up a step."""
_LEARNING_RATE = 0.25
_COOLDOWN, _LONGEST_COOLDOWN = 8, 256


@dataclass(frozen=True)
class SpeculativeConfig:
    """When drafts are made.

    Attributes:
        max_tokens: of one draft.
        max_rows: rows of a data-parallel rank's decode step up to which drafts are verified.
        cost: duration of a step that verifies drafts, in plain decode steps; 0 to draft whatever
            it costs.
    """

    max_tokens: int
    max_rows: int
    cost: float = 0.0


class NGramIndex:
    """The position after the latest occurrence of each n-gram of a growing list of tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 1

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; they are indexed by the calls of ``draft`` that follow."""
        self.tokens += tokens

    def draft(self, max_tokens: int) -> list[int]:
        """Up to ``max_tokens`` tokens that may follow; none while tokens are left to index.

        At the end of the known tokens the draft continues with itself: what repeats, repeats.
        """
        tokens, after = self.tokens, self._after
        end = min(len(tokens), self._indexed + _INDEXED_PER_STEP)
        for position in range(self._indexed, end):
            for size in _NGRAM_SIZES:
                if size <= position:
                    after[tuple(tokens[position - size : position])] = position
        self._indexed = max(self._indexed, end)
        if self._indexed < len(tokens):
            return []
        for size in _NGRAM_SIZES:
            start = after.get(tuple(tokens[-size:]))
            if start is not None and len(tokens) >= size:
                period = len(tokens) - start
                return [tokens[start + i % period] for i in range(max_tokens)]
        return []


@dataclass(slots=True)
class Acceptance:
    """How many tokens of a sequence's drafts are accepted, and whether to make another draft.

    Attributes:
        mean: accepted tokens of a draft, as a moving average.
        cooldown: number of tokens still to decode before the next draft.
    """

    mean: float = 2.0
    cooldown: int = 0
    _cooldowns: int = 0

    def update(self, drafted: int, accepted: int, cost: float) -> None:
        """Record the result of a draft.

        Drafts that cost more than they bring start a cooldown, each longer than the last.
        """
        self.mean += _LEARNING_RATE * (accepted - self.mean)
        if accepted == drafted:
            self._cooldowns = 0
        if 1 + self.mean < cost:
            self.cooldown = min(_COOLDOWN << self._cooldowns, _LONGEST_COOLDOWN)
            self._cooldowns += 1
            self.mean = cost  # one draft is tried after the cooldown


@dataclass(slots=True)
class _Drafter:
    """What is kept for one sequence."""

    index: NGramIndex = field(default_factory=NGramIndex)
    acceptance: Acceptance = field(default_factory=Acceptance)


class Speculator:
    """Makes the drafts of all sequences of a scheduler. Not thread-safe.

    Args:
        config: None to make no drafts.
    """

    def __init__(self, config: SpeculativeConfig | None) -> None:
        self._config = config
        self._drafters: dict[Sequence, _Drafter] = {}

    def allows(self, num_rows: int) -> bool:
        """Whether a rank that decodes that many rows may have drafts."""
        return self._config is not None and num_rows <= self._config.max_rows

    def draft(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the known ones of a sequence; often none."""
        if not self._config:
            return []
        wanted = sequence.request.max_tokens - len(sequence.output) - 1
        max_tokens = min(self._config.max_tokens, wanted)
        if sequence not in self._drafters:
            self._drafters[sequence] = _Drafter()
        drafter = self._drafters[sequence]
        if max_tokens < 1 or drafter.acceptance.cooldown:
            return []
        drafter.index.extend(sequence.tokens(len(drafter.index.tokens)))
        return drafter.index.draft(max_tokens)

    def decoded(self, sequence: Sequence) -> None:
        """Count a decode step of a sequence, with or without a draft, towards its cooldown."""
        if (drafter := self._drafters.get(sequence)) and drafter.acceptance.cooldown:
            drafter.acceptance.cooldown -= 1

    def update(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how many tokens of a sequence's draft were accepted."""
        if self._config and (drafter := self._drafters.get(sequence)):
            drafter.acceptance.update(drafted, accepted, self._config.cost)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._drafters.pop(sequence, None)


def accepted_tokens(draft: Tokens[int], sampled: Tokens[int]) -> tuple[int, ...]:
    """The tokens a verifying step yields: the part of the draft that was sampled, and one more."""
    count = 0
    while count < len(draft) and draft[count] == sampled[count]:
        count += 1
    return tuple(sampled[: count + 1])
