"""How many prompt tokens a step prefills, and in which shape: a budget of time, kept by measuring.

A step decodes one token for each running request and prefills chunks of prompts beside that, so the
running requests wait for the prefill. While there are any, a step prefills no more than it is
expected to do within the budget for inter-token latency, or, where that is longer, within the time
of decoding. While nobody waits for a next token, it prefills as much as the largest shape holds.

Both are one forward pass, which reads every weight once, so prefill costs what it adds to decoding.
That is measured for a few numbers of tokens when the engine starts. While it runs, every step that
both decodes and prefills says how much slower or faster the machine is now, for whatever reason:
other work, longer contexts, a lower clock.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

Shape = tuple[int, int]
"""Number of rows of a prefill step, and tokens of each row."""

LEAST_TOKENS = 16
"""The smallest part of a prompt that a step computes, unless it is the last one. Fewer tokens take
hardly less time, since every weight is read for them."""
_MULTIPLE = 8
"""Larger parts are multiples of this, as are the rows of a kernel's tiles."""

_LATEST = 15
"""Loads and decode times are medians of so many steps. A change is noticed after half of them, and
what disturbs single steps changes nothing."""
_LEAST_LOAD = 0.01
"""The least that is believed: a step may take less than decoding did of late."""
_MARGIN = 1.1
"""How much longer prefill is expected to take than at the median, so that most steps keep the
budget. Steps on an idle machine differ by less."""


@dataclass(frozen=True, slots=True)
class PrefillShapes:
    """The shapes of one rank's prefill steps, each a compiled program, and the choice of one.

    A prefill step computes a rectangle of rows and tokens, a part of which may be padding. None is
    larger than the longest chunk.

    Attributes:
        shapes: sorted by their number of tokens.
        overhead: fixed cost of a step, in tokens: the time in which the weights are read, and the
            time that decode rows wait meanwhile.
        padding: cost of a token of padding, in tokens of a prompt, from 0 to 1.
    """

    shapes: tuple[Shape, ...]
    overhead: int
    padding: float = 1.0

    @classmethod
    def of(
        cls, chunks: Tokens[int], slots: int, overhead: int, padding: float = 1.0
    ) -> "PrefillShapes":
        """Each chunk in one row, and in as many rows as the longest chunk's tokens allow.

        Where padding costs as much as tokens, a step that may not take that long needs fewer rows
        of a chunk: as many as each longer chunk's tokens allow.
        """
        filled = chunks if padding == 1 else chunks[-1:]
        shapes = {
            (max(1, min(slots, tokens // chunk)), chunk)
            for chunk in chunks
            for tokens in (chunk, *filled)
        }
        rising = tuple(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))
        return cls(rising, overhead, padding)

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of one step."""
        rows, chunk = self.shapes[-1]
        return rows * chunk

    @property
    def max_rows(self) -> int:
        """Maximum number of rows of one step."""
        return max(rows for rows, _ in self.shapes)

    def cost(self, shape: Shape, tokens: int) -> float:
        """What a step of a shape costs with ``tokens`` prompt tokens in it, in such tokens."""
        rows, chunk = shape
        return tokens + self.padding * (rows * chunk - tokens)

    def fitting(self, shape: Shape, cost: float) -> int:
        """The inverse of ``cost``: the prompt tokens of a shape that cost no more; 0 if none do."""
        rows, chunk = shape
        if cost >= rows * chunk:
            return rows * chunk
        if self.padding == 1:
            return 0
        return max(0, int((cost - self.padding * rows * chunk) / (1 - self.padding)))

    def choose(self, lengths: Tokens[int], limits: dict[Shape, int]) -> Shape:
        """The shape that computes most prompt tokens for its cost.

        The last chunk of a prompt is partly padding. That cost is spread over all chunks of the
        prompt, so that a cut is judged by where it leads. Among equals the shape with longer rows
        wins: it ends some prompts sooner and none later.

        Args:
            lengths: prompt tokens that each sequence lacks, in the order of their turn; not empty.
            limits: the shapes to choose from, and the prompt tokens that each may compute.
        """

        def worth(shape: Shape) -> tuple[float, int]:
            rows, chunk = shape
            wanted = sum(length / -(-length // chunk) for length in lengths[:rows])
            computed = min(wanted, limits[shape])
            padded = rows * chunk - computed
            return computed / (self.overhead + computed + self.padding * padded), chunk

        return max(limits, key=worth)


class PrefillTimes:
    """The time that prefill adds to a step, by its cost in tokens (``PrefillShapes.cost``).

    Between the costs that were measured it is interpolated.

    Args:
        measured: pairs of a cost in tokens and the seconds that prefill alone took; empty: it takes
            no time.
        decode_seconds: what of these a step that decodes takes anyway, to read every weight. A
            tenth of the time counts as prefill's whatever was measured.
    """

    def __init__(
        self, measured: Tokens[tuple[float, float]] = (), decode_seconds: float = 0.0
    ) -> None:
        tokens, seconds = [0.0], [0.0]
        for each, took in sorted(measured):
            # More tokens take no less time, and no more for each of them. So a time that was taken
            # while something else ran does little harm.
            if len(tokens) > 1:
                took = min(max(took, seconds[-1]), seconds[-1] * each / tokens[-1])
            tokens.append(each)
            seconds.append(took)
        self._tokens = tokens
        self._seconds = [max(took - decode_seconds, took / 10) for took in seconds]

    def seconds(self, tokens: float) -> float:
        """The seconds that prefill of this cost takes; the least measured ones, if it is less."""
        if len(self._tokens) == 1:
            return 0.0
        return _interpolate(max(tokens, self._tokens[1]), self._tokens, self._seconds)

    def tokens(self, seconds: float) -> float:
        """The largest cost that takes at most so many seconds; 0.0 if none does."""
        if len(self._tokens) == 1 or seconds == math.inf:
            return math.inf
        if seconds < self._seconds[1]:
            return 0.0
        return _interpolate(seconds, self._seconds, self._tokens)


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """``y`` at ``x`` on a line through rising points; beyond the last one it is the last one's."""
    if x >= xs[-1]:
        return ys[-1]
    i = bisect_left(xs, x)
    if xs[i] == x:
        return ys[i]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


class PrefillPlan(NamedTuple):
    """The prefill of one step on each rank: a compiled shape, and the tokens to compute in it."""

    shape: Shape
    max_tokens: int


class PrefillPlanner:
    """Plans the prefill of every step, the same for all data-parallel ranks. Not thread-safe.

    A step that decodes may prefill for the budget, or for as long as decoding takes, whichever is
    longer: a prompt that got less than half of the engine would hardly ever be done. Where even
    ``LEAST_TOKENS`` take longer than that, prefill takes turns with steps that only decode: each
    step earns that time, and prefill runs when what was earned pays for it. So the bound holds on
    average, and every prompt goes on.

    Args:
        shapes: the compiled shapes.
        times: what they take, measured when the engine started.
        budget: seconds that prefill may add to a step that decodes, if decoding takes no longer.
        compiled: whether a shape can be used yet; some can from the start, and those remain.
        decode_seconds: what decoding one row takes, measured when the engine started.

    Attributes:
        shapes: the compiled shapes.
    """

    def __init__(
        self,
        shapes: PrefillShapes,
        times: PrefillTimes | None = None,
        budget: float = math.inf,
        compiled: Callable[[Shape], bool] = lambda shape: True,
        decode_seconds: float = 0.0,
    ) -> None:
        self.shapes = shapes
        self._compiled = compiled
        self._times, self._budget = times or PrefillTimes(), budget
        self._bound = budget
        self._load = _MARGIN
        self._loads = deque([1.0] * _LATEST, _LATEST)
        self._decodes: deque[float] = deque(maxlen=_LATEST)
        self._decode_rows: deque[int] = deque(maxlen=_LATEST)
        self._decode_at_start = decode_seconds
        self._earned = 0.0
        self._allowed = math.inf
        self._decoding = False
        self._plan: PrefillPlan | None = None

    @property
    def allowance(self) -> int:
        """The prompt tokens that a step which decodes prefills at most now, on average."""
        least = self._least_seconds()
        limit = max(self._limits(max(self._bound, least)).values())
        return limit if least <= self._bound else max(1, int(limit * self._bound / least))

    def decode_steps(self, most: int) -> int:
        """How many decode steps, up to ``most``, take no longer than half of the budget together.

        A prompt that arrives waits for those that run and for as many that are dispatched ahead. 1
        until a step has been measured.
        """
        if not self._decodes:
            return 1
        return max(1, int(min(most, self._budget / 2 / median(self._decodes))))

    def begin_step(self, *, decoding: bool) -> None:
        """Start to plan a step; ``decoding``: some running request waits for its next token."""
        self._decoding, self._plan = decoding, None
        if decoding:
            # What is left of a turn counts for the next one; more is not saved up.
            most = max(self._bound, self._least_seconds())
            self._earned = min(self._earned, most) + self._bound
            self._allowed = min(self._earned, most)
        else:
            self._allowed = math.inf

    def plan(self, lengths: Tokens[int]) -> PrefillPlan | None:
        """The step's prefill; None if there is none.

        Args:
            lengths: the prompt tokens that each sequence of a rank lacks, in the order of their
                turn. The first rank that has any decides for all.
        """
        if self._plan or not lengths:
            return self._plan
        limits = self._limits(self._allowed)
        if not limits:
            return None  # its turn comes in a later step
        shape = rows, chunk = self.shapes.choose(lengths, limits)
        self._plan = PrefillPlan(shape, limits[shape])
        if self._decoding:
            computed = sum(min(length, chunk) for length in lengths[:rows])
            self._earned -= self._expected(shape, min(computed, limits[shape]))
        return self._plan

    def decoded(self, seconds: float, rows: int) -> None:
        """Record that a step took so many seconds to decode so many rows."""
        self._decodes.append(seconds)
        self._decode_rows.append(rows)
        self._bound = max(self._budget, median(self._decodes))

    def mixed(self, shape: Shape, tokens: int, rows: int, seconds: float) -> None:
        """Record that a step took so long to decode ``rows`` rows and prefill ``tokens`` tokens."""
        self.prefilled(shape, tokens, seconds - self._decode_seconds(rows))

    def _decode_seconds(self, rows: int) -> float:
        """What decoding so many rows takes: on a line through one row at start and those of late.

        While prompts arrive, steps have fewer rows than those that only decoded before.
        """
        if not self._decodes:
            return self._decode_at_start
        seconds, many = median(self._decodes), median(self._decode_rows)
        if many <= 1:
            return seconds
        one = min(self._decode_at_start, seconds)
        return one + (seconds - one) * (rows - 1) / (many - 1)

    def prefilled(self, shape: Shape, tokens: int, seconds: float) -> None:
        """Record that prefill of ``tokens`` tokens added so many seconds to a step that decoded."""
        if at_start := self._times.seconds(self.shapes.cost(shape, tokens)):
            self._loads.append(max(_LEAST_LOAD, seconds / at_start))
            self._load = _MARGIN * median(self._loads)

    def _expected(self, shape: Shape, tokens: int) -> float:
        """The seconds that prefill of ``tokens`` prompt tokens in a shape takes now."""
        return self._load * self._times.seconds(self.shapes.cost(shape, tokens))

    def _least_seconds(self) -> float:
        """The seconds that the smallest prefill takes now."""
        smallest = next(filter(self._compiled, self.shapes.shapes))
        return self._expected(smallest, min(LEAST_TOKENS, smallest[1]))

    def _limits(self, seconds: float) -> dict[Shape, int]:
        """The shapes that can compute something in so many seconds, and how many prompt tokens."""
        limits = {}
        # The time that was earned for a shape pays for it, whatever the last bits say.
        most = self._times.tokens(seconds / self._load * (1 + 1e-9))
        for shape in filter(self._compiled, self.shapes.shapes):
            rows, chunk = shape
            fitting = self.shapes.fitting(shape, most)
            if fitting < rows * chunk:
                fitting -= fitting % min(_MULTIPLE, chunk)
            if fitting >= min(LEAST_TOKENS, chunk):
                limits[shape] = fitting
        return limits
