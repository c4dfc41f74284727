"""Who runs next. Plain Python: slots and pages are numbers here, and no array is touched.

Every step decodes one token for each running request and, beside that, prefills at most one chunk
of one prompt: so a running stream never waits longer than one chunk, however long the prompts that
arrive. When pages run out, the least urgent request gives up its own and starts over later.

Owners of requests share the engine evenly, by the tokens they were served (Virtual Token Counter:
Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588). A flood of
one does not keep the others waiting, not even while its long generations hold every slot.
"""

from collections import Counter
from dataclasses import dataclass

from inferneo_jax.pages import PagePool
from inferneo_jax.sequence import Sequence


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
    """A sequence whose newest token lies at ``position``."""

    sequence: Sequence
    position: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step runs. ``admitted`` just got its slot and must be put there first."""

    admitted: Sequence | None
    prefill: PrefillChunk | None
    decode: tuple[DecodeRow, ...]

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


_PROMPT_COST, _OUTPUT_COST = 1, 2
"""What a token counts for its owner: one of the output keeps the device busy for longer."""


class Scheduler:
    """Slots, pages and the order of requests."""

    def __init__(self, slots: int, pool: PagePool, max_chunk: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_chunk = max_chunk
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: list[Sequence] = []
        self._served: Counter[str] = Counter()  # by owner; more than that of those not in it

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return len(self.running) + len(self._waiting)

    def counts(self, arriving: int) -> dict[str, int]:
        """Numbers for ``EngineStats``; ``arriving`` sequences will be added soon."""
        return {
            "slots": len(self.running) + len(self._free_slots),
            "slots_used": len(self.running),
            "pages": self.pool.num_pages,
            "pages_used": self.pool.num_used,
            "pages_cached": self.pool.num_cached,
            "page_len": self.pool.page_len,
            "running": len(self.running),
            "waiting": len(self._waiting) + arriving,
            "preemptions": self.num_preemptions,
        }

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; among its owner's by priority, then arrival."""
        owner = sequence.request.owner
        active = {each.request.owner for each in (*self._waiting, *self.running)}
        if owner not in active:
            # Nobody gets credit for the time in which it asked for nothing.
            least = min((self._served[each] for each in active), default=0)
            kept = {o: n for o, n in self._served.items() if active and (n > least or o in active)}
            self._served = Counter(kept)
            self._served[owner] = max(self._served[owner], least)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot and pages."""
        if sequence.slot is not None:
            self.publish(sequence)
            self._vacate(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step, on the assumption that it will be run."""
        claimant = self._make_room()
        preemptions = self.num_preemptions
        decode = self._plan_decode()
        admitted = None
        prefilling = min(
            (s for s in self.running if s.in_prefill), key=lambda s: s.urgency, default=None
        )
        # Pages that a preemption just freed are for those who lacked them, not for newcomers.
        if prefilling is None and self.num_preemptions == preemptions:
            prefilling = admitted = self._admit(claimant or self._next())
        prefill = self._plan_chunk(prefilling) if prefilling else None
        return StepPlan(admitted, prefill, decode)

    def publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full of known, computed tokens."""
        page_len = self.pool.page_len
        full = min(sequence.num_computed, sequence.num_known) // page_len
        if full > sequence.num_published:
            hashes = sequence.page_hashes(page_len, full * page_len)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.pages[index], hashes[index])
            sequence.num_published = full

    def _plan_decode(self) -> tuple[DecodeRow, ...]:
        rows = []
        # Who gives way when pages run out comes last, so that nothing planned is taken back.
        order = self._by_claim()
        for sequence in order:
            if not sequence.can_decode:
                continue
            self.publish(sequence)
            if not self._ensure_page(sequence, order):
                continue
            rows.append(DecodeRow(sequence, sequence.num_computed))
            self._served[sequence.request.owner] += _OUTPUT_COST
            sequence.num_computed += 1
            sequence.num_sampled += 1
        return tuple(rows)

    def _by_claim(self) -> list[Sequence]:
        """The running sequences: the owner that holds least pages first, there the most urgent."""
        held: Counter[str] = Counter()
        for sequence in self.running:
            held[sequence.request.owner] += len(sequence.pages)
        return sorted(self.running, key=lambda s: (held[s.request.owner], s.urgency))

    def _ensure_page(self, sequence: Sequence, order: list[Sequence]) -> bool:
        """Make room for one more token; False when the sequence itself had to give way."""
        while sequence.num_computed >= len(sequence.pages) * self.pool.page_len:
            if pages := self.pool.allocate(1):
                sequence.pages += pages
                continue
            victim = next(each for each in reversed(order) if each.slot is not None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return sequence.slot is not None

    def _next(self) -> Sequence | None:
        """Whose turn it is of those that wait: the owner served least, there the most urgent."""
        return min(
            self._waiting, key=lambda s: (self._served[s.request.owner], s.urgency), default=None
        )

    def _make_room(self) -> Sequence | None:
        """Take a slot from the owner with most, for one who has two fewer; who is to have it.

        So the slots come to be shared evenly, and never go back and forth.
        """
        if self._free_slots or not (claimant := self._next()):
            return None
        slots = Counter(sequence.request.owner for sequence in self.running)
        owner, most = slots.most_common(1)[0]
        if most - slots[claimant.request.owner] < 2:
            return None
        victim = max((s for s in self.running if s.request.owner == owner), key=lambda s: s.urgency)
        pages = self.pool.num_available + len(victim.pages)
        if pages < self.pool.pages_for(claimant.num_known + 1) + len(self.running):
            return None
        self._preempt(victim)
        return claimant

    def _admit(self, sequence: Sequence | None) -> Sequence | None:
        """Give a waiting sequence a slot and pages, if both are there."""
        if sequence is None or not self._free_slots:
            return None
        assert len(sequence.output) == sequence.num_sampled, "admitted with a token in flight"
        # The last token is always computed, since its logits are what the prefill is for.
        reusable = 0 if sequence.request.prompt_logprobs is not None else sequence.num_known - 1
        shared = self.pool.match(sequence.page_hashes(self.pool.page_len, reusable))
        missing = self.pool.pages_for(sequence.num_known + 1) - len(shared)
        spare = len(self.running)  # the next page of each running sequence
        enough = self.pool.num_available >= missing + spare
        pages = self.pool.allocate(missing) if enough else None
        if pages is None:
            self.pool.release(shared)
            return None
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.pages = shared + pages
        sequence.prefill_len = sequence.num_known
        sequence.num_computed = len(shared) * self.pool.page_len
        sequence.num_published = len(shared)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        self.running.append(sequence)
        return sequence

    def _plan_chunk(self, sequence: Sequence) -> PrefillChunk:
        start = sequence.num_computed
        length = min(sequence.prefill_len - start, self._max_chunk)
        sequence.num_computed += length
        ends = sequence.num_computed == sequence.prefill_len
        sample = ends and sequence.num_sampled < sequence.request.max_tokens
        sequence.num_sampled += sample
        self.publish(sequence)
        self._served[sequence.request.owner] += length * _PROMPT_COST
        return PrefillChunk(sequence, start, length, sample, ends)

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and pages away; the tokens stay, and are computed again later."""
        self.num_preemptions += 1
        self.publish(sequence)  # what is not needed by others meanwhile will be found again
        self._vacate(sequence)
        sequence.num_computed = 0
        self._waiting.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.pool.release(sequence.pages)
        sequence.slot = None
        sequence.pages = []
        sequence.num_published = 0
