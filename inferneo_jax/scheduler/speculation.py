"""Speculative decoding: drafts of what a sequence may go on with, and whether they pay. No device.

Text often repeats what it has said: names, quotations, code. So the tokens that followed when the
newest few came before are a draft, which one step verifies in hardly more time than one token takes
(prompt look-up: Saxena 2023; Leviathan et al., arXiv:2211.17192). Where nothing repeats, a second,
smaller model can make the draft; how long it should be follows from the times measured at start and
from how often the sequence's drafts are accepted. Drafts never change which tokens are sampled: a
draft proposes each token with certainty, so accepting the one that is drawn anyway is the rejection
sampling of the paper.

Where a grammar constrains a sequence, what it forces is the draft: it is sampled for certain. What
is looked up is cut where the grammar does not allow it; the draft model, which knows no grammar,
makes no drafts for it.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.text.grammar import Matcher

_NGRAM_SIZES = (3, 2)
"""Number of newest tokens that must have come before; the longer match is preferred."""
_INDEXED_PER_STEP = 1024
"""Tokens that one call indexes at most: a long prompt must not hold up a step."""
_LEARNING_RATE = 0.25
_COOLDOWN, _LONGEST_COOLDOWN = 8, 256


_MEMORY = 0.9
"""Weight of what is known of a draft model's acceptance, when another draft is verified."""
_PRIOR = 7.0, 10.0
"""Accepted and tried tokens that are assumed of a draft model before any was verified."""
_INHERITED = 5.0
"""Tried tokens that a new sequence takes over from those before it."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """How long the parts of a step with a certain number of rows take, in plain decode steps.

    Attributes:
        verify: verifying drafts.
        draft: drafting one token of each row with the draft model.
        fill: computing one token whose keys and values the draft model lacks.
    """

    verify: float
    draft: float = 0.0
    fill: float = 0.0

    def toward(self, other: "StepCosts", part: float) -> "StepCosts":
        """The costs at a part, from 0 to 1, of the way to others."""
        return StepCosts(
            self.verify + part * (other.verify - self.verify),
            self.draft + part * (other.draft - self.draft),
            self.fill + part * (other.fill - self.fill),
        )


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What drafts of the draft model are subject to.

    Attributes:
        max_len: tokens of the longest sequence that it can process.
        fill_tokens: most tokens that it computes in one step before it drafts.
    """

    max_len: int
    fill_tokens: int


@dataclass(frozen=True)
class SpeculativeConfig:
    """When drafts are made, and by what.

    Attributes:
        max_tokens: of one draft.
        costs: of steps with 1, 2, ... rows on a data-parallel rank; steps with more rows have no
            drafts.
        always: whether to draft whatever it costs.
        ngram: whether drafts are looked up among the tokens of the sequence.
        model: of the draft model; None: there is none.
    """

    max_tokens: int
    costs: tuple[StepCosts, ...]
    always: bool = False
    ngram: bool = True
    model: DraftModel | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft of what may follow the newest token.

    Attributes:
        tokens: that were looked up; empty if the draft model is to make the draft.
        count: number of tokens; 0: no draft.
    """

    tokens: tuple[int, ...] = ()
    count: int = 0


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
class AcceptanceRate:
    """How likely the next token of a draft model's draft is accepted: a moving average.

    Attributes:
        accepted: tokens that were accepted, the older ones weighted less.
        tried: tokens before which all others of their draft had been accepted, weighted alike.
        cooldown: number of tokens still to decode before the next draft.
    """

    accepted: float = _PRIOR[0]
    tried: float = _PRIOR[1]
    cooldown: int = 0
    _cooldowns: int = 0

    def inherit(self) -> "AcceptanceRate":
        """What a new sequence starts with."""
        return AcceptanceRate(_INHERITED * self.accepted / self.tried, _INHERITED)

    def update(self, drafted: int, accepted: int) -> None:
        """Record the result of a draft."""
        self.accepted = _MEMORY * self.accepted + accepted
        self.tried = _MEMORY * self.tried + min(accepted + 1, drafted)
        if accepted == drafted:
            self._cooldowns = 0

    def best(self, most: int, costs: StepCosts) -> tuple[int, float]:
        """The number of tokens, up to ``most``, at which drafts bring most; how much that is.

        This is tokens by the time of a plain step. No tokens bring 1.0 (section 3.3 of the paper).
        """
        rate = self.accepted / self.tried
        best, expected = (0, 1.0), 1.0
        for count in range(1, most + 1):
            expected += rate**count
            best = max(best, (count, expected / (costs.verify + count * costs.draft)), key=_speed)
        return best

    def rest(self) -> None:
        """Start a cooldown, longer than the last, after which one draft is tried."""
        self.cooldown = min(_COOLDOWN << self._cooldowns, _LONGEST_COOLDOWN)
        self._cooldowns += 1
        self.accepted = self.tried = 1.0


def _speed(choice: tuple[int, float]) -> float:
    return choice[1]


@dataclass(slots=True)
class _Drafter:
    """What is kept for one sequence: of drafts that are looked up, and of the draft model's.

    Attributes:
        forced: whether a grammar forces the draft that was made last.
    """

    rate: AcceptanceRate
    forced: bool = False
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
        self._rate = AcceptanceRate()
        self._costs = config.costs[0] if config else StepCosts(1.0)

    @property
    def fill_tokens(self) -> int:
        """Most tokens that the draft model computes in one step before it drafts."""
        model = self._config and self._config.model
        return model.fill_tokens if model else 0

    def allows(self, num_rows: int) -> bool:
        """Whether steps of that many rows on the fullest rank have drafts; ``draft`` makes such."""
        if not self._config or num_rows > len(self._config.costs):
            return False
        self._costs = self._config.costs[max(0, num_rows - 1)]
        return True

    def draft(self, sequence: Sequence) -> Draft:
        """What may follow the known tokens of a sequence; often nothing."""
        config = self._config
        if not config:
            return Draft()
        most = min(config.max_tokens, sequence.request.max_tokens - len(sequence.output) - 1)
        if sequence not in self._drafters:
            self._drafters[sequence] = _Drafter(self._rate.inherit())
        drafter = self._drafters[sequence]
        if most < 1:
            return Draft()
        if sequence.matcher:
            return self._constrained_draft(sequence, sequence.matcher, drafter, most)
        looked_up = self._look_up(sequence, drafter, most) if config.ngram else []
        length, speed = self._model_draft(sequence, drafter, most)
        if looked_up and 1 + drafter.acceptance.mean >= speed * self._costs.verify:
            return Draft(tuple(looked_up), len(looked_up))
        return Draft((), length) if length else Draft(tuple(looked_up), len(looked_up))

    def decoded(self, sequence: Sequence) -> None:
        """Count a decode step of a sequence, with or without a draft, towards its cooldowns."""
        if drafter := self._drafters.get(sequence):
            drafter.acceptance.cooldown = max(0, drafter.acceptance.cooldown - 1)
            drafter.rate.cooldown = max(0, drafter.rate.cooldown - 1)

    def update(self, sequence: Sequence, drafted: int, accepted: int, *, by_model: bool) -> None:
        """Learn how many tokens of a sequence's draft were accepted."""
        if by_model:
            self._rate.update(drafted, accepted)
        if not self._config or not (drafter := self._drafters.get(sequence)) or drafter.forced:
            return
        if by_model:
            drafter.rate.update(drafted, accepted)
        else:
            cost = 0.0 if self._config.always else self._costs.verify
            drafter.acceptance.update(drafted, accepted, cost)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._drafters.pop(sequence, None)

    def _constrained_draft(
        self, sequence: Sequence, matcher: Matcher, drafter: _Drafter, most: int
    ) -> Draft:
        """What a grammar forces, if that pays; else what is looked up, as far as it is allowed."""
        assert self._config
        forced = matcher.forced()[:most]
        drafter.forced = bool(forced) and 1 + len(forced) >= self._costs.verify
        if drafter.forced:
            return Draft(tuple(forced), len(forced))
        looked_up = self._look_up(sequence, drafter, most) if self._config.ngram else []
        allowed = looked_up[: matcher.accepted(looked_up)]
        return Draft(tuple(allowed), len(allowed))

    def _look_up(self, sequence: Sequence, drafter: _Drafter, most: int) -> list[int]:
        if drafter.acceptance.cooldown:
            return []
        drafter.index.extend(sequence.tokens(len(drafter.index.tokens)))
        return drafter.index.draft(most)

    def _model_draft(self, sequence: Sequence, drafter: _Drafter, most: int) -> tuple[int, float]:
        """How many tokens the draft model is to draft, and how many times as fast that is."""
        assert self._config
        model, rate = self._config.model, drafter.rate
        if not model or rate.cooldown or sequence.num_known + most > model.max_len:
            return 0, 1.0
        if self._config.always:
            return most, 1.0
        length, speed = rate.best(most, self._costs)
        if not length:
            rate.rest()
            return 0, 1.0
        # What the model has not seen must pay within the tokens that may still come.
        left = sequence.request.max_tokens - len(sequence.output)
        missing = sequence.num_known - 1 - sequence.num_draft_computed
        pays = missing * self._costs.fill <= left * (1 - 1 / speed)
        return (length, speed) if pays else (0, 1.0)


def accepted_tokens(draft: Tokens[int], sampled: Tokens[int]) -> tuple[int, ...]:
    """The tokens a verifying step yields: the part of the draft that was sampled, and one more."""
    count = 0
    while count < len(draft) and draft[count] == sampled[count]:
        count += 1
    return tuple(sampled[: count + 1])
