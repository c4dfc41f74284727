"""What one step runs: made by the scheduler, carried out by the runner."""

from dataclasses import dataclass

from inferneo_jax.scheduler.chunked_prefill import Shape
from inferneo_jax.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """``length`` tokens of a sequence from position ``start``; ``sample`` the next one after."""

    sequence: Sequence
    start: int
    length: int
    sample: bool
    ends_prompt: bool


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A sequence whose newest token lies at ``position``, and what may come after it."""

    sequence: Sequence
    position: int
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step runs on one data-parallel rank.

    Attributes:
        admitted: just got their slots, and must be put there first.
        prefill: one chunk of each of several prompts.
        shape: that holds them; None: there are none.
        decode: rows that get their next token.
    """

    admitted: tuple[Sequence, ...]
    prefill: tuple[PrefillChunk, ...]
    shape: Shape | None
    decode: tuple[DecodeRow, ...]

    @property
    def drafted(self) -> bool:
        """Whether some rows of decode have drafts."""
        return any(row.draft for row in self.decode)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


SchedulerOutputs = tuple[SchedulerOutput, ...]
"""What one step runs, by data-parallel rank."""
