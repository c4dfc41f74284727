"""How long new requests would take, estimated from the engine's recent steps.

The estimate assumes that every slot is always busy, that prompts and outputs are computed side by
side, and that a request generates as many tokens as recent ones did, which is seldom its maximum.
All three make it low rather than high; under a steady load it is about right.
"""

import math
from collections import deque
from dataclasses import dataclass
from functools import cache

from inferneo_jax.request import EngineTotals, GenerationRequest
from inferneo_jax.scheduler.sequence import Sequence

_DECAY_SECONDS = 3.0
"""Time constant of the averages, in seconds of engine time."""
_LENGTHS_KEPT, _LENGTHS_NEEDED = 64, 8
"""How many output lengths are kept, and how many are needed for an estimate."""

Measured = tuple[float, tuple[int, ...]]
"""Seconds of a step, and the lengths of recent outputs."""


@dataclass(slots=True)
class _Work:
    """Tokens left to compute."""

    prompt: float = 0.0
    output: float = 0.0


class Forecast:
    """Measures steps and output lengths on the engine's thread; any thread may ask.

    Args:
        slots: maximum number of sequences that decode together.

    Attributes:
        measured: what is known; elsewhere, what the engine's process has measured.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._busy = self._steps = 0.0
        self._recent: deque[int] = deque(maxlen=_LENGTHS_KEPT)
        # Replaced as a whole, never changed, since other threads read it.
        self.measured: Measured = 0.0, ()

    def stepped(self, seconds: float, *, steps: int) -> None:
        """Record that the engine worked for ``seconds`` and completed ``steps`` steps."""
        kept = math.exp(-seconds / _DECAY_SECONDS)
        self._busy = self._busy * kept + seconds
        self._steps = self._steps * kept + steps
        if self._steps:
            self.measured = self._busy / self._steps, self.measured[1]

    def finished(self, tokens: int) -> None:
        """Record the output length of a finished request."""
        self._recent.append(tokens)
        self.measured = self.measured[0], tuple(self._recent)

    def seconds(
        self,
        live: list[Sequence],
        requests: list[GenerationRequest],
        totals: EngineTotals,
        allowance: int,
    ) -> float | None:
        """Seconds until all of ``requests``, of one owner and priority, would have finished.

        None if they need not wait for a slot, the engine has nothing else to do, or too little has
        been measured.

        Args:
            live: accepted sequences that have not finished.
            requests: the new requests.
            totals: the engine's totals, which show what the prefix cache and drafts have saved.
            allowance: prompt tokens that a step prefills at most while it decodes.
        """
        pace, lengths = self.measured
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
        own_steps = len(owners) * self._steps_for(own_work, allowance)
        wait = min(self._steps_for(all_work, allowance), own_steps)
        alone = len(last.prompt) * uncached / allowance + expected(last.max_tokens) / drafted
        return pace * (wait + alone)

    def _steps_for(self, work: _Work, allowance: int) -> float:
        """The minimum number of steps for this work."""
        return max(work.prompt / allowance, work.output / self._slots)
