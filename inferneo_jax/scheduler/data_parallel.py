"""Requests shared out over the groups of devices that serve requests of their own.

A group is what lies at one place of the mesh's ``data`` axis: it has its own slots and pages, and
so its own scheduler. All groups run each step together, one program each of prefill and decode: so
the prefill's shape is one for all, which they take turns to choose. A request stays in the group it
was given to, where its pages are.
"""

from inferneo_jax.scheduler.block_pool import PagePool
from inferneo_jax.scheduler.chunked_prefill import PrefillShapes
from inferneo_jax.scheduler.output import StepPlan
from inferneo_jax.scheduler.scheduler import Scheduler
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import Drafts

Plans = tuple[StepPlan, ...]
"""What one step runs, group by group."""


class Groups:
    """The schedulers of all groups. With one group it is no more than that group's scheduler."""

    def __init__(
        self, groups: int, *, slots: int, num_pages: int, page_len: int, shapes: PrefillShapes
    ) -> None:

        def make() -> list[Scheduler]:
            pools = [PagePool(num_pages, page_len) for _ in range(groups)]
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
        """Queue a new sequence in the group that has least to do."""
        loads = [scheduler.num_sequences for scheduler in self._schedulers]
        sequence.group = loads.index(min(loads))
        self._schedulers[sequence.group].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot and pages."""
        self._schedulers[sequence.group].remove(sequence)

    def may_draft(self, drafts: Drafts | None) -> bool:
        """Whether the next step may have drafts, once what is under way is known."""
        if drafts is None or not self._few(drafts):
            return False
        return any(each.may_draft(drafts) for each in self._schedulers)

    def _few(self, drafts: Drafts) -> bool:
        """Whether no group decodes more rows than may have drafts."""
        return all(each.num_decoding() <= drafts.rows for each in self._schedulers)

    def accept(self, sequence: Sequence, drafted: int, accepted: int, cost: float) -> None:
        """Count the tokens of a draft that were sampled, beside the one that each step brings."""
        self._schedulers[sequence.group].accept(sequence, drafted, accepted, cost)

    def schedule(self, drafts: Drafts | None = None) -> Plans | None:
        """Plan the next step, on the assumption that it will be run; None: there is none.

        Args:
            drafts: how to make them, if every sampled token is known; None: for no row.
        """
        if drafts and not self._few(drafts):
            drafts = None
        self._first = (self._first + 1) % len(self._schedulers)
        shape, plans = None, {}
        for group in (*range(self._first, len(self._schedulers)), *range(self._first)):
            plans[group] = self._schedulers[group].schedule(shape, drafts)
            shape = shape or plans[group].shape
        return tuple(plans[group] for group in sorted(plans)) if any(plans.values()) else None

    def counts(self) -> dict[str, int]:
        """Numbers for ``EngineStats``."""
        each = [scheduler.counts() for scheduler in self._schedulers]
        total = {name: sum(counts[name] for counts in each) for name in each[0]}
        return total | {
            "page_len": each[0]["page_len"],
            "preemptions": total["preemptions"] + self._preemptions_before,
        }
