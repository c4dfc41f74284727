"""One scheduler per data-parallel rank, behind the interface of one.

A rank is one place on the mesh's ``data`` axis. It has its own slots and pages, and so its own
scheduler. All ranks run each step together, as one program each for prefill and for decode, so they
share the shape of the prefill and take turns to choose it. A request stays on the rank it was given
to, where its pages are.
"""

from inferneo_jax.scheduler.block_pool import PagePool
from inferneo_jax.scheduler.chunked_prefill import PrefillShapes
from inferneo_jax.scheduler.output import SchedulerOutputs
from inferneo_jax.scheduler.scheduler import Scheduler
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import Drafts


class DataParallelScheduler:
    """The schedulers of all data-parallel ranks. Not thread-safe."""

    def __init__(
        self, dp_size: int, *, slots: int, num_pages: int, page_len: int, shapes: PrefillShapes
    ) -> None:

        def make() -> list[Scheduler]:
            pools = [PagePool(num_pages, page_len) for _ in range(dp_size)]
            return [Scheduler(slots, pool, shapes) for pool in pools]

        self._make = make
        self._schedulers = make()
        self._preemptions_before = 0
        self._first = 0

    def clear(self) -> None:
        """Forget every sequence and page; what was counted stays."""
        self._preemptions_before = self.counts()["preemptions"]
        self._schedulers = self._make()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence on the rank with the fewest sequences."""
        loads = [scheduler.num_sequences for scheduler in self._schedulers]
        sequence.dp_rank = loads.index(min(loads))
        self._schedulers[sequence.dp_rank].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot and pages."""
        self._schedulers[sequence.dp_rank].remove(sequence)

    def may_draft(self, drafts: Drafts | None) -> bool:
        """Whether the next step may have drafts, once what is under way is known."""
        if drafts is None or not self._few(drafts):
            return False
        return any(each.may_draft(drafts) for each in self._schedulers)

    def _few(self, drafts: Drafts) -> bool:
        """Whether no rank decodes more rows than may have drafts."""
        return all(each.num_decoding() <= drafts.rows for each in self._schedulers)

    def accept(self, sequence: Sequence, drafted: int, accepted: int, cost: float) -> None:
        """Count the tokens of a draft that were sampled, beside the one that each step brings."""
        self._schedulers[sequence.dp_rank].accept(sequence, drafted, accepted, cost)

    def schedule(self, drafts: Drafts | None = None) -> SchedulerOutputs | None:
        """Schedule the next step, on the assumption that it will be run; None: there is none.

        Args:
            drafts: how to make them, if every sampled token is known; None: for no row.
        """
        if drafts and not self._few(drafts):
            drafts = None
        self._first = (self._first + 1) % len(self._schedulers)
        shape, outputs = None, {}
        for rank in (*range(self._first, len(self._schedulers)), *range(self._first)):
            outputs[rank] = self._schedulers[rank].schedule(shape, drafts)
            shape = shape or outputs[rank].shape
        return tuple(outputs[rank] for rank in sorted(outputs)) if any(outputs.values()) else None

    def counts(self) -> dict[str, int]:
        """Numbers for ``EngineStats``."""
        each = [scheduler.counts() for scheduler in self._schedulers]
        total = {name: sum(counts[name] for counts in each) for name in each[0]}
        return total | {
            "page_len": each[0]["page_len"],
            "preemptions": total["preemptions"] + self._preemptions_before,
        }
