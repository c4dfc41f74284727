"""Who runs next. Plain Python: slots and pages are numbers here, and no array is touched.

Every step decodes one token for each running request and, beside that, prefills several prompts,
or chunks of them, up to the token budget of ``prefill.py``. So a running stream never waits longer
than for one step of that many prompt tokens, however many and however long the prompts that arrive.
A prompt that begins as one that is being computed waits for its pages instead of computing them
again. When pages run out, the least urgent request gives up its own and starts over later.

Owners of requests share the engine evenly, by the tokens they were served (Virtual Token Counter:
Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588). A flood of
one does not keep the others waiting, not even while its long generations hold every slot.
"""

import time
from collections import Counter
from collections.abc import Iterable

from inferneo_jax.scheduler.block_pool import PagePool
from inferneo_jax.scheduler.chunked_prefill import PrefillShapes, Shape
from inferneo_jax.scheduler.output import DecodeRow, PrefillChunk, SchedulerOutput
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import Drafts

_PROMPT_COST, _OUTPUT_COST = 1, 2
"""What a token counts for its owner: one of the output keeps the device busy for longer."""


class Scheduler:
    """Slots, pages and the order of requests."""

    def __init__(self, slots: int, pool: PagePool, shapes: PrefillShapes) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._shapes = shapes
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: list[Sequence] = []
        self._served: Counter[str] = Counter()  # by owner; more than that of those not in it

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return len(self.running) + len(self._waiting)

    def counts(self) -> dict[str, int]:
        """Numbers for ``EngineStats``."""
        return {
            "slots": len(self.running) + len(self._free_slots),
            "slots_used": len(self.running),
            "pages": self.pool.num_pages,
            "pages_used": self.pool.num_used,
            "pages_cached": self.pool.num_cached,
            "page_len": self.pool.page_len,
            "running": len(self.running),
            "waiting": len(self._waiting),
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

    def schedule(self, shape: Shape | None = None, drafts: Drafts | None = None) -> SchedulerOutput:
        """Plan the next step, on the assumption that it will be run.

        Args:
            shape: of its prefill, when another rank has chosen one.
            drafts: how to make them; None: for no row. Every sampled token must be known.
        """
        claimant = self._make_room()
        preemptions = self.num_preemptions
        decode = self._plan_decode(drafts)
        # Pages that a preemption just freed are for those who lacked them, not for newcomers.
        crowded = self.num_preemptions > preemptions
        admitted = () if crowded else self._admit(claimant)
        shape, prefill = self._plan_prefill(shape)
        return SchedulerOutput(admitted, prefill, shape, decode)

    def publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full of known, computed tokens."""
        page_len = self.pool.page_len
        full = min(sequence.num_computed, sequence.num_known) // page_len
        if full > sequence.num_published:
            hashes = sequence.page_hashes(page_len, full * page_len)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.pages[index], hashes[index])
            sequence.num_published = full

    def num_decoding(self) -> int:
        """Sequences that a decode step may have rows for."""
        return sum(sequence.can_decode for sequence in self.running)

    def may_draft(self, drafts: Drafts) -> bool:
        """Whether some sequence is likely to have a draft, once what is under way is known."""
        return any(s.can_decode and s.draft(drafts.most) for s in self.running)

    def accept(self, sequence: Sequence, drafted: int, accepted: int, cost: float) -> None:
        """Count the tokens of a draft that were sampled, beside the one that each step brings."""
        sequence.num_computed += accepted
        sequence.num_sampled += accepted
        self._served[sequence.request.owner] += accepted * _OUTPUT_COST
        sequence.drafting.luck.learn(drafted, accepted, cost)

    def _draft(self, sequence: Sequence, drafts: Drafts) -> tuple[int, ...]:
        """What may follow a sequence's newest token, as far as there are pages for it."""
        draft = sequence.draft(drafts.most)
        missing = self.pool.pages_for(sequence.num_computed + 1 + len(draft)) - len(sequence.pages)
        spare = self.pool.num_available - len(self.running)
        if missing > 0 and missing <= spare:
            sequence.pages += self.pool.allocate(missing) or []
        room = len(sequence.pages) * self.pool.page_len - sequence.num_computed - 1
        return tuple(draft[:room])

    def _plan_decode(self, drafts: Drafts | None) -> tuple[DecodeRow, ...]:
        rows = []
        # Who gives way when pages run out comes last, so that nothing planned is taken back.
        order = self._by_claim()
        for sequence in order:
            if not sequence.can_decode:
                continue
            self.publish(sequence)
            if not self._ensure_page(sequence, order):
                continue
            draft = self._draft(sequence, drafts) if drafts else ()
            rows.append(DecodeRow(sequence, sequence.num_computed, draft))
            sequence.drafting.luck.rest -= sequence.drafting.luck.rest > 0
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

    def _next(self, besides: Iterable[Sequence] = ()) -> Sequence | None:
        """Whose turn it is of those that wait: the owner served least, there the most urgent."""
        return min(
            (sequence for sequence in self._waiting if sequence not in besides),
            key=lambda s: (self._served[s.request.owner], s.urgency),
            default=None,
        )

    def _make_room(self) -> Sequence | None:
        """Take a slot from the owner with most, for one who has two fewer; who is to have it.

        So the slots come to be shared evenly, and never go back and forth.
        """
        if self._free_slots or not self._lacks_prompts() or not (claimant := self._next()):
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

    def _prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.in_prefill]

    def _lacks_prompts(self) -> bool:
        """Whether a step could prefill more than what has a slot."""
        missing = [sequence.num_missing for sequence in self._prefilling()]
        return len(missing) < self._shapes.max_rows and sum(missing) < self._shapes.budget

    def _admit(self, claimant: Sequence | None) -> tuple[Sequence, ...]:
        """Give those whose turn it is slots and pages, until there is enough to prefill."""
        admitted: list[Sequence] = []
        put_off: set[Sequence] = set()
        coming = {each for sequence in self._prefilling() for each in self._unpublished(sequence)}
        while (
            self._free_slots
            and self._lacks_prompts()
            and len(put_off) < self._shapes.max_rows
            and (sequence := claimant or self._next(put_off))
        ):
            # The last token is always computed, since its logits are what the prefill is for.
            scored = sequence.request.prompt_logprobs is not None
            reusable = 0 if scored else sequence.num_known - 1
            hashes = sequence.page_hashes(self.pool.page_len, reusable)
            shared = self.pool.match(hashes)
            if not claimant and len(shared) < len(hashes) and hashes[len(shared)] in coming:
                self.pool.release(shared)  # another computes that page now
                put_off.add(sequence)
                continue
            missing = self.pool.pages_for(sequence.num_known + 1) - len(shared)
            spare = len(self.running)  # the next page of each running sequence
            enough = self.pool.num_available >= missing + spare
            pages = self.pool.allocate(missing) if enough else None
            if pages is None:
                self.pool.release(shared)
                break
            self._seat(sequence, shared, pages)
            admitted.append(sequence)
            coming.update(self._unpublished(sequence))
            claimant = None
        return tuple(admitted)

    def _seat(self, sequence: Sequence, shared: list[int], pages: list[int]) -> None:
        assert len(sequence.output) == sequence.num_sampled, "admitted with a token in flight"
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.pages = shared + pages
        sequence.prefill_len = sequence.num_known
        sequence.num_computed = len(shared) * self.pool.page_len
        sequence.num_published = len(shared)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            sequence.admitted_at = time.monotonic()
        self._served[sequence.request.owner] += sequence.num_missing * _PROMPT_COST
        self.running.append(sequence)

    def _unpublished(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the pages that its prefill is still going to fill."""
        hashes = sequence.page_hashes(self.pool.page_len, sequence.prefill_len)
        return hashes[sequence.num_published :]

    def _plan_prefill(self, shape: Shape | None) -> tuple[Shape | None, tuple[PrefillChunk, ...]]:
        """The next chunk of each prompt that fits the shape, in order of admission."""
        if not (sequences := self._prefilling()):
            return None, ()
        shape = shape or self._shapes.choose([sequence.num_missing for sequence in sequences])
        rows, chunk = shape
        return shape, tuple(self._plan_chunk(sequence, chunk) for sequence in sequences[:rows])

    def _plan_chunk(self, sequence: Sequence, most: int) -> PrefillChunk:
        start = sequence.num_computed
        length = min(sequence.num_missing, most)
        sequence.num_computed += length
        ends = sequence.num_computed == sequence.prefill_len
        sample = ends and sequence.num_sampled < sequence.request.max_tokens
        sequence.num_sampled += sample
        self.publish(sequence)
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
