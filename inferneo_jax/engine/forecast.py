"""How long new requests would take, estimated from what the engine measured of late.

The estimate takes every slot to be busy all the time, prompts and outputs to be computed side by
side, and a request to write as many tokens as those before it did, which is seldom all that it may.
All three make it low rather than high; under a steady load it is about right.
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import cache

from inferneo_jax.request import EngineTotals, GenerationRequest
from inferneo_jax.scheduler.sequence import Sequence

_OF_LATE = 3.0
"""Seconds of steps after which a measurement has lost most of its weight."""
_LENGTHS_KEPT, _LENGTHS_NEEDED = 64, 8
"""Finished requests whose lengths are known, and how many are needed for an estimate."""


@dataclass(slots=True)
class _Work:
    """Tokens that are left to compute."""

    prompt: float = 0.0
    output: float = 0.0


class Forecast:
    """Measures steps and lengths on the engine's thread; any thread may ask.

    Args:
        slots: sequences that decode side by side.
        budget: prompt tokens that one step computes at most.
    """

    def __init__(self, slots: int, budget: int) -> None:
        self._slots, self._budget = slots, budget
        self._busy = self._steps = 0.0
        self._recent: deque[int] = deque(maxlen=_LENGTHS_KEPT)
        # Replaced as a whole, never changed, since other threads read it.
        self._known: tuple[float, tuple[int, ...]] = 0.0, ()

    def stepped(self, seconds: float, *, steps: int) -> None:
        """The engine worked for so long, and completed so many steps."""
        kept = math.exp(-seconds / _OF_LATE)
        self._busy = self._busy * kept + seconds
        self._steps = self._steps * kept + steps
        if self._steps:
            self._known = self._busy / self._steps, self._known[1]

    def finished(self, tokens: int) -> None:
        """A request was finished after so many tokens."""
        self._recent.append(tokens)
        self._known = self._known[0], tuple(self._recent)

    def seconds(
        self, live: list[Sequence], requests: list[GenerationRequest], totals: EngineTotals
    ) -> float | None:
        """Seconds until all of ``requests``, of one owner and priority, would have finished.

        None if they need not wait for a slot, the engine has nothing else to do, or too little has
        been measured.

        Args:
            live: the sequences that the engine has accepted and not finished.
            requests: those that it is asked for beside.
            totals: tell what prefixes in the cache and drafts have spared so far.
        """
        pace, lengths = self._known
        waits = live and len(live) + len(requests) > self._slots
        if not waits or not pace or len(lengths) < _LENGTHS_NEEDED:
            return None

        @cache
        def expected(max_tokens: int) -> float:
            return sum(min(each, max_tokens) for each in lengths) / len(lengths)

        # Tokens that a decode step brings to a row, and the share of prompts that is computed.
        drafted = max(1, totals.output_tokens) / max(
            1, totals.output_tokens - totals.accepted_tokens
        )
        looked_up = totals.prompt_tokens + totals.cached_tokens
        uncached = totals.prompt_tokens / max(1, looked_up)
        owner, priority = requests[0].owner, requests[0].priority
        all_work, own_work, owners = _Work(), _Work(), {owner}

        def add(mine: bool, prompt: float, output: float) -> None:
            for work in (all_work, own_work) if mine else (all_work,):
                work.prompt += prompt * uncached
                work.output += max(0.0, output) / drafted

        for sequence in live:
            request = sequence.request
            owners.add(request.owner)
            mine = request.owner == owner
            if sequence.paused or (mine and request.priority > priority):
                continue  # it takes no steps now, or comes after the new ones
            missing = max(0, len(request.prompt) - sequence.num_computed)
            add(mine, missing, expected(request.max_tokens) - sequence.num_sampled)
        *others, last = requests
        for request in others:
            add(True, len(request.prompt), expected(request.max_tokens))
        # An owner has its share of the engine, however much the others have asked for before.
        wait = min(self._steps_for(all_work), len(owners) * self._steps_for(own_work))
        alone = len(last.prompt) * uncached / self._budget + expected(last.max_tokens) / drafted
        return pace * (wait + alone)

    def _steps_for(self, work: _Work) -> float:
        """The fewest steps in which so much can be computed."""
        return max(work.prompt / self._budget, work.output / self._slots)
