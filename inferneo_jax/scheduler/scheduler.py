"""Who runs next: each step's decode rows and prefill chunks, and who holds which slot and blocks.

Every step decodes one token for each running request and, beside that, prefills several prompts,
or chunks of them, as far as the planner allows (``prefill.py``). So a running stream does not wait
long for its next token, however many and however long the prompts that arrive. A prompt that
begins like one that is being computed waits for its blocks instead of computing them again. When
blocks run out, the least urgent request gives up its own and starts over later.

Owners of requests share the engine evenly, by the tokens they were served (Virtual Token Counter:
Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv:2401.00588). A flood of
requests from one owner does not keep the others waiting, not even while it holds every slot.

``Scheduler`` serves one data-parallel rank; ``DataParallelScheduler``, at the end, all of them.
"""

import time
from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from inferneo_jax.request import FinishReason
from inferneo_jax.scheduler.block_pool import BlockPool
from inferneo_jax.scheduler.prefill import PrefillPlanner, Shape
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import SpeculativeConfig, Speculator

_PROMPT_COST, _OUTPUT_COST = 1, 2
"""What a token is charged to its owner; an output token keeps the device busy for longer."""


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
    """A sequence whose newest token is at ``position``, and a draft of what may follow it.

    Attributes:
        sequence: the sequence.
        position: of its newest token.
        draft: tokens that were looked up; empty if there is no draft, or the draft model makes it.
        num_drafted: number of tokens of the draft.
        fill: tokens before the newest one that the draft model computes first, as it lacks their
            keys and values.
        num_steps: number of decode steps, dispatched together, that each sample a token for it; 1
            with a draft.
    """

    sequence: Sequence
    position: int
    draft: tuple[int, ...] = ()
    num_drafted: int = 0
    fill: PrefillChunk | None = None
    num_steps: int = 1

    @property
    def by_model(self) -> bool:
        """Whether the draft model makes the draft."""
        return self.num_drafted > len(self.draft)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step runs on one data-parallel rank.

    Attributes:
        admitted: sequences that just got their slots, whose tokens must be written there first.
        prefill: one chunk of each of several prompts.
        shape: the shape of the prefill; None without prefill.
        decode: rows that get their next token.
    """

    admitted: tuple[Sequence, ...]
    prefill: tuple[PrefillChunk, ...]
    shape: Shape | None
    decode: tuple[DecodeRow, ...]

    @property
    def drafted(self) -> bool:
        """Whether some decode rows have drafts."""
        return any(row.num_drafted for row in self.decode)

    @property
    def num_steps(self) -> int:
        """Number of decode steps that are dispatched together; 0 without decode rows."""
        return max((row.num_steps for row in self.decode), default=0)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get tokens, those of decode rows first."""
        chunks = [chunk.sequence for chunk in self.prefill if chunk.sample]
        return [*(row.sequence for row in self.decode), *chunks]

    @property
    def constrained(self) -> bool:
        """Whether a grammar constrains what some sequence gets."""
        return any(sequence.matcher is not None for sequence in self.sampled)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


SchedulerOutputs = tuple[SchedulerOutput, ...]
"""What one step runs, by data-parallel rank."""


def prefill_shape(scheduled: SchedulerOutputs) -> Shape | None:
    """The shape of a step's prefill, the same on every rank that has one; None without prefill."""
    return next((output.shape for output in scheduled if output.shape), None)


def num_decode_steps(scheduled: SchedulerOutputs) -> int:
    """Number of decode steps that are dispatched together; 0 without decode rows."""
    return max(output.num_steps for output in scheduled)


class Scheduler:
    """Slots, blocks and the order of requests on one data-parallel rank.

    Attributes:
        pool: its blocks.
        running: sequences that hold slots.
        num_preemptions: how often one had to give its slot up.
        num_constrained: sequences, running or waiting, that have grammars.
    """

    def __init__(
        self, slots: int, pool: BlockPool, planner: PrefillPlanner, speculator: Speculator
    ) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_constrained = 0
        self._planner = planner
        self._shortest_first = False
        self._speculator = speculator
        self._fill_left = 0  # tokens that the draft model may still compute in this step
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: list[Sequence] = []
        self._share = _FairShare()

    @property
    def num_sequences(self) -> int:
        """Sequences that run or wait."""
        return len(self.running) + len(self._waiting)

    def num_decoding(self) -> int:
        """Sequences that a decode step may have rows for."""
        return sum(sequence.can_decode for sequence in self.running)

    def awaits_prompts(self) -> bool:
        """Whether a prompt lacks tokens, or could be admitted to a free slot."""
        return bool(self.prefilling() or (self._waiting and self._free_slots))

    def has_draft(self) -> bool:
        """Whether some sequence is likely to have a draft, once what is in flight is known."""
        return any(
            each.can_decode and self._speculator.draft(each).count and self._may_fill(each)
            for each in self.running
        )

    def counts(self) -> dict[str, int]:
        """Numbers for ``EngineStats``."""
        return {
            "slots": len(self.running) + len(self._free_slots),
            "slots_used": len(self.running),
            "pages": self.pool.num_blocks,
            "pages_used": self.pool.num_used,
            "pages_cached": self.pool.num_cached,
            "page_len": self.pool.block_len,
            "running": len(self.running),
            "waiting": len(self._waiting),
            "preemptions": self.num_preemptions,
        }

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; among its owner's by priority, then arrival."""
        self._share.join(sequence.request.owner)
        self.num_constrained += sequence.matcher is not None
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot and blocks."""
        if sequence.slot is not None:
            self._cache_blocks(sequence)
            self._free_slot(sequence)
        else:
            self._waiting.remove(sequence)
        self._share.leave(sequence.request.owner)
        self.num_constrained -= sequence.matcher is not None
        self._speculator.forget(sequence)

    def schedule(self, *, draft: bool = False, num_steps: int = 1) -> SchedulerOutput:
        """Schedule the next step, on the assumption that it will be run.

        The planner must know of the step (``PrefillPlanner.begin_step``).

        Args:
            draft: whether to make drafts; every sampled token must have been committed.
            num_steps: maximum number of decode steps to run together, without drafts.
        """
        candidate = self._make_room()
        preemptions = self.num_preemptions
        # A slot that was just taken from its owner is for a prompt.
        decode = self._schedule_decode(draft=draft, num_steps=1 if candidate else num_steps)
        # Blocks that a preemption just freed are for those who lacked them, not for newcomers.
        crowded = self.num_preemptions > preemptions
        admitted = () if crowded else self._admit(candidate)
        shape, prefill = self._schedule_prefill()
        return SchedulerOutput(admitted, prefill, shape, decode)

    def commit(
        self,
        sequence: Sequence,
        tokens: Tokens[int],
        num_drafted: int = 0,
        *,
        by_model: bool = False,
    ) -> tuple[int, FinishReason | None]:
        """Append the tokens that a step sampled for a sequence, up to the one that ends it.

        Args:
            sequence: the sequence, which may have ended while the step was in flight.
            tokens: accepted tokens of a draft and the one after them, or one of each step that was
                dispatched; empty for a chunk that does not end its prompt.
            num_drafted: number of tokens of the draft that was verified.
            by_model: whether the draft model made it.

        Returns:
            How many of the tokens were appended, and why the last one ends the sequence: it is a
            stop token or completes what the grammar allows, or there are enough.
        """
        request = sequence.request
        if num_drafted:
            accepted = len(tokens) - 1  # the other one was counted when the step was scheduled
            sequence.num_computed += accepted
            sequence.num_sampled += accepted
            # The draft model has no use for keys and values of tokens that were not accepted.
            sequence.num_draft_computed = min(sequence.num_draft_computed, sequence.num_computed)
            self._share.charge(request.owner, accepted * _OUTPUT_COST)
            self._speculator.update(sequence, num_drafted, accepted, by_model=by_model)
        if sequence.finished:
            return 0, None  # it ended while the step was in flight
        for count, token in enumerate(tokens, start=1):
            sequence.output.append(token)
            if token in request.stop_token_ids:
                return count, "stop"
            if sequence.matcher and sequence.matcher.consume(token):
                return count, "stop"
            if len(sequence.output) >= request.max_tokens:
                return count, "length"
        return len(tokens), None

    def _schedule_decode(self, *, draft: bool, num_steps: int) -> tuple[DecodeRow, ...]:
        rows = []
        self._fill_left = self._speculator.fill_tokens
        # Who gives way when blocks run out comes last, so that nothing scheduled is taken back.
        order = self._by_share()
        for sequence in order:
            if not sequence.can_decode:
                continue
            self._cache_blocks(sequence)
            if not self._allocate_block(sequence, order):
                continue
            row = self._draft(sequence) if draft else self._plain(sequence, num_steps)
            rows.append(row)
            self._speculator.decoded(sequence)
            self._share.charge(sequence.request.owner, row.num_steps * _OUTPUT_COST)
            sequence.num_computed += row.num_steps
            sequence.num_sampled += row.num_steps
        return tuple(rows)

    def _by_share(self) -> list[Sequence]:
        """The running sequences, by the number of blocks their owner holds, then by urgency."""
        held: Counter[str] = Counter()
        for sequence in self.running:
            held[sequence.request.owner] += len(sequence.blocks)
        return sorted(self.running, key=lambda s: (held[s.request.owner], s.urgency))

    def _allocate_block(self, sequence: Sequence, order: list[Sequence]) -> bool:
        """Make room for one more token; False when the sequence itself had to give way."""
        while sequence.num_computed >= len(sequence.blocks) * self.pool.block_len:
            if blocks := self.pool.allocate(1):
                sequence.blocks += blocks
                continue
            victim = next(each for each in reversed(order) if each.slot is not None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return sequence.slot is not None

    def _plain(self, sequence: Sequence, num_steps: int) -> DecodeRow:
        """A row for up to ``num_steps`` steps, as far as it lacks tokens and there are blocks."""
        position = sequence.num_computed
        ahead = min(num_steps, sequence.request.max_tokens - sequence.num_sampled) - 1
        return DecodeRow(sequence, position, num_steps=1 + self._reserve(sequence, ahead))

    def _reserve(self, sequence: Sequence, ahead: int) -> int:
        """How many positions after the next one, of ``ahead``, have blocks; it may get more."""
        after = sequence.num_computed + 1
        missing = self.pool.blocks_for(after + ahead) - len(sequence.blocks)
        if 0 < missing <= self.pool.num_available - len(self.running):
            sequence.blocks += self.pool.allocate(missing) or []
        return min(ahead, len(sequence.blocks) * self.pool.block_len - after)

    def _draft(self, sequence: Sequence) -> DecodeRow:
        """A row with a draft of what may follow, as far as there are blocks for it."""
        position = sequence.num_computed
        draft = self._speculator.draft(sequence)
        count = self._reserve(sequence, draft.count)
        if draft.tokens or not count:
            return DecodeRow(sequence, position, draft.tokens[:count], count)
        fill = self._fill(sequence)
        if sequence.num_draft_computed < position:
            return DecodeRow(sequence, position, fill=fill)
        sequence.num_draft_computed = position + count
        return DecodeRow(sequence, position, (), count, fill)

    def _fill(self, sequence: Sequence) -> PrefillChunk | None:
        """The next tokens before the newest one that the draft model lacks, as many as fit."""
        start = sequence.num_draft_computed
        missing = sequence.num_computed - start
        # A draft that was accepted to its end leaves one token: that one is always computed.
        length = 1 if missing == 1 else min(missing, self._fill_left)
        if length < 1 or not self._may_fill(sequence):
            return None
        self._fill_left -= length
        sequence.num_draft_computed += length
        return PrefillChunk(sequence, start, length, sample=False, ends_prompt=False)

    def _may_fill(self, sequence: Sequence) -> bool:
        """Whether the draft model may compute what it lacks of a sequence: prompts come first."""
        missing = sequence.num_computed - sequence.num_draft_computed
        return missing <= 1 or not self.prefilling()

    def _schedule_prefill(self) -> tuple[Shape | None, tuple[PrefillChunk, ...]]:
        """The next chunk of each prompt that fits the plan.

        Steps alternate between the order of admission and that of the tokens left: short prompts do
        not wait for long ones, and the first in line goes on in every other step.
        """
        sequences = self.prefilling()
        if self._shortest_first:
            sequences.sort(key=lambda sequence: sequence.num_missing)
        plan = self._planner.plan([sequence.num_missing for sequence in sequences])
        if not plan or not sequences:
            return None, ()
        self._shortest_first = not self._shortest_first
        (rows, chunk), left = plan
        chunks = []
        for sequence in sequences[:rows]:
            if left:
                chunks.append(self._schedule_chunk(sequence, min(chunk, left)))
                left -= chunks[-1].length
        return plan.shape, tuple(chunks)

    def _schedule_chunk(self, sequence: Sequence, max_tokens: int) -> PrefillChunk:
        start = sequence.num_computed
        length = min(sequence.num_missing, max_tokens)
        sequence.num_computed += length
        ends = sequence.num_computed == sequence.prefill_len
        sample = ends and sequence.num_sampled < sequence.request.max_tokens
        sequence.num_sampled += sample
        self._cache_blocks(sequence)
        return PrefillChunk(sequence, start, length, sample, ends)

    def prefilling(self) -> list[Sequence]:
        """The running sequences that lack a part of their prompt."""
        return [sequence for sequence in self.running if sequence.in_prefill]

    def _lacks_prompts(self) -> bool:
        """Whether a step could prefill more than the running sequences need."""
        missing = [sequence.num_missing for sequence in self.prefilling()]
        shapes = self._planner.shapes
        return len(missing) < shapes.max_rows and sum(missing) < shapes.max_tokens

    def _next_waiting(self, skipped: Collection[Sequence] = ()) -> Sequence | None:
        """Whose turn it is: of the owner served least, the most urgent."""
        return min(
            (sequence for sequence in self._waiting if sequence not in skipped),
            key=lambda s: (self._share.served[s.request.owner], s.urgency),
            default=None,
        )

    def _make_room(self) -> Sequence | None:
        """Take a slot from the owner with most, for one with at least two fewer; who is to have it.

        So the slots come to be shared evenly, and never go back and forth.
        """
        if self._free_slots or not self._lacks_prompts():
            return None
        if not (candidate := self._next_waiting()):
            return None
        slots = Counter(sequence.request.owner for sequence in self.running)
        owner, most = slots.most_common(1)[0]
        if most - slots[candidate.request.owner] < 2:
            return None
        victim = max((s for s in self.running if s.request.owner == owner), key=lambda s: s.urgency)
        blocks = self.pool.num_available + len(victim.blocks)
        if blocks < self.pool.blocks_for(candidate.num_known + 1) + len(self.running):
            return None
        self._preempt(victim)
        return candidate

    def _admit(self, candidate: Sequence | None) -> tuple[Sequence, ...]:
        """Allocate slots and blocks to those whose turn it is, as many as one step can prefill."""
        admitted: list[Sequence] = []
        put_off: set[Sequence] = set()
        coming = {each for sequence in self.prefilling() for each in self._uncached(sequence)}
        while (
            self._free_slots
            and len(self.prefilling()) < self._planner.shapes.max_rows
            and len(put_off) < self._planner.shapes.max_rows
            and (sequence := candidate or self._next_waiting(put_off))
        ):
            # The last token is always computed, since its logits are what the prefill is for.
            scored = sequence.request.prompt_logprobs is not None
            reusable = 0 if scored else sequence.num_known - 1
            hashes = sequence.block_hashes(self.pool.block_len, reusable)
            shared = self.pool.match_prefix(hashes)
            if not candidate and len(shared) < len(hashes) and hashes[len(shared)] in coming:
                self.pool.release(shared)  # another sequence computes that block now
                put_off.add(sequence)
                continue
            missing = self.pool.blocks_for(sequence.num_known + 1) - len(shared)
            spare = len(self.running)  # the next block of each running sequence
            enough = self.pool.num_available >= missing + spare
            blocks = self.pool.allocate(missing) if enough else None
            if blocks is None:
                self.pool.release(shared)
                break
            self._allocate_slot(sequence, shared, blocks)
            admitted.append(sequence)
            coming.update(self._uncached(sequence))
            candidate = None
        return tuple(admitted)

    def _allocate_slot(self, sequence: Sequence, shared: list[int], blocks: list[int]) -> None:
        assert len(sequence.output) == sequence.num_sampled, "admitted with a token in flight"
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.blocks = shared + blocks
        sequence.prefill_len = sequence.num_known
        sequence.num_computed = len(shared) * self.pool.block_len
        sequence.num_draft_computed = self.pool.num_drafted(shared) * self.pool.block_len
        sequence.num_cached_blocks = len(shared)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            sequence.admitted_at = time.monotonic()
        self._share.charge(sequence.request.owner, sequence.num_missing * _PROMPT_COST)
        self.running.append(sequence)

    def _free_slot(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        drafted = min(sequence.num_draft_computed, sequence.num_known) // self.pool.block_len
        self.pool.mark_drafted(sequence.blocks[:drafted])
        self.pool.release(sequence.blocks)
        sequence.slot = None
        sequence.blocks = []
        sequence.num_cached_blocks = 0

    def _preempt(self, sequence: Sequence) -> None:
        """Take slot and blocks away; the tokens stay, and are computed again later."""
        self.num_preemptions += 1
        self._cache_blocks(sequence)  # what is not needed by others meanwhile will be found again
        self._free_slot(sequence)
        sequence.num_computed = sequence.num_draft_computed = 0
        self._waiting.append(sequence)

    def _cache_blocks(self, sequence: Sequence) -> None:
        """Let others share the blocks that are full of known, computed tokens."""
        block_len = self.pool.block_len
        full = min(sequence.num_computed, sequence.num_known) // block_len
        if full > sequence.num_cached_blocks:
            hashes = sequence.block_hashes(block_len, full * block_len)
            for index in range(sequence.num_cached_blocks, full):
                self.pool.cache_block(sequence.blocks[index], hashes[index])
            sequence.num_cached_blocks = full

    def _uncached(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that its prefill is still going to fill."""
        hashes = sequence.block_hashes(self.pool.block_len, sequence.prefill_len)
        return hashes[sequence.num_cached_blocks :]


class _FairShare:
    """Tokens served to each owner of requests (the paper's virtual counters).

    Attributes:
        served: by owner; owners that are missing were served no more than any active one.
    """

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self._sequences: Counter[str] = Counter()  # by active owner

    def join(self, owner: str) -> None:
        """Count a new sequence; its owner gets no credit for a time in which it had none."""
        active = self._sequences
        if owner not in active:
            least = min((self.served[each] for each in active), default=0)
            # A counter at or below the least says nothing, once its owner has gone.
            kept = {o: n for o, n in self.served.items() if active and (n > least or o in active)}
            self.served = Counter(kept)
            self.served[owner] = max(self.served[owner], least)
        active[owner] += 1

    def leave(self, owner: str) -> None:
        """Count a sequence that has ended."""
        self._sequences[owner] -= 1
        if not self._sequences[owner]:
            del self._sequences[owner]

    def charge(self, owner: str, tokens: int) -> None:
        """Count tokens served, weighted by their cost."""
        self.served[owner] += tokens


class DataParallelScheduler:
    """One scheduler per data-parallel rank, behind the interface of one. Not thread-safe.

    A rank is one place on the mesh's ``data`` axis. It has its own slots and blocks, and so its own
    scheduler. All ranks run each step together, as one program each for prefill and for decode, so
    they share the plan of the prefill and take turns to be asked first. A request stays on the rank
    it was given to, where its blocks are.
    """

    def __init__(
        self,
        dp_size: int,
        *,
        slots: int,
        num_blocks: int,
        block_len: int,
        planner: PrefillPlanner,
        speculation: SpeculativeConfig | None = None,
        decode_steps: int = 1,
    ) -> None:

        def make() -> list[Scheduler]:
            self._speculator = Speculator(speculation)
            pools = [BlockPool(num_blocks, block_len) for _ in range(dp_size)]
            return [Scheduler(slots, pool, planner, self._speculator) for pool in pools]

        self._make = make
        self._planner = planner
        self._decode_steps = decode_steps
        self._ranks = make()
        self._preemptions_before = 0
        self._first = 0

    def clear(self) -> None:
        """Forget every sequence and block; what was counted stays."""
        self._preemptions_before = self.counts()["preemptions"]
        self._ranks = self._make()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence on the rank with the fewest sequences."""
        loads = [rank.num_sequences for rank in self._ranks]
        sequence.dp_rank = loads.index(min(loads))
        self._ranks[sequence.dp_rank].add(sequence)

    def pause(self, sequence: Sequence, *, paused: bool) -> None:
        """Decode no further tokens of a sequence, or go on; it keeps its slot and blocks."""
        sequence.paused = paused

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its slot and blocks."""
        self._ranks[sequence.dp_rank].remove(sequence)

    @property
    def has_grammars(self) -> bool:
        """Whether a grammar constrains some sequence, running or waiting."""
        return any(rank.num_constrained for rank in self._ranks)

    def must_commit(self, in_flight: SchedulerOutputs) -> bool:
        """Whether a step must be committed before the next is scheduled.

        It must if it has drafts or the next one may have some: drafts follow known tokens only.
        """
        if any(output.drafted for output in in_flight):
            return True
        return self._allows_drafts() and any(rank.has_draft() for rank in self._ranks)

    def schedule(self, *, draft: bool = False) -> SchedulerOutputs | None:
        """Schedule the next step, on the assumption that it will be run; None: there is none.

        Args:
            draft: whether to make drafts; every sampled token must have been committed.
        """
        drafts = self._allows_drafts()
        num_steps = 1
        # Where drafts are allowed, the next one may follow any token. What a grammar allows is
        # known only once the token before is.
        awaited = self.has_grammars or any(rank.awaits_prompts() for rank in self._ranks)
        if not drafts and not awaited:
            num_steps = self._planner.decode_steps(self._decode_steps)
        self._planner.begin_step(decoding=any(rank.num_decoding() for rank in self._ranks))
        self._first = (self._first + 1) % len(self._ranks)
        outputs = {}
        for rank in (*range(self._first, len(self._ranks)), *range(self._first)):
            outputs[rank] = self._ranks[rank].schedule(draft=draft and drafts, num_steps=num_steps)
        return tuple(outputs[rank] for rank in sorted(outputs)) if any(outputs.values()) else None

    def commit(
        self,
        sequence: Sequence,
        tokens: Tokens[int],
        num_drafted: int = 0,
        *,
        by_model: bool = False,
    ) -> tuple[int, FinishReason | None]:
        """As ``Scheduler.commit``."""
        rank = self._ranks[sequence.dp_rank]
        return rank.commit(sequence, tokens, num_drafted, by_model=by_model)

    def measured(
        self, scheduled: SchedulerOutputs, decode_seconds: float, mixed_seconds: float
    ) -> None:
        """Record how long a step took to decode, or to decode and prefill in one pass.

        0.0 for what it did not do. What is prefilled alone is not recorded: what the largest chunks
        take says little about small ones.
        """
        rows = max(len(output.decode) for output in scheduled)
        if decode_seconds:
            self._planner.decoded(decode_seconds / num_decode_steps(scheduled), rows)
        if mixed_seconds and (shape := prefill_shape(scheduled)):
            tokens = max(sum(chunk.length for chunk in output.prefill) for output in scheduled)
            self._planner.mixed(shape, tokens, rows, mixed_seconds)

    def cached_blocks(self, hashes: Tokens[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of block hashes, on the only rank.

        They are held by nobody: their contents are to be read before the next step.
        """
        (rank,) = self._ranks
        blocks = rank.pool.match_prefix(hashes)
        rank.pool.release(blocks)
        return blocks

    def cache_blocks(self, hashes: Tokens[bytes], start: int) -> list[int | None]:
        """Cache the blocks of a chain of block hashes from block ``start``, on the only rank.

        Returns:
            For each block where its contents are to be written before the next step; None where
            they are cached already. Empty if that holds for all, there is no room, or blocks before
            them are not cached.
        """
        (rank,) = self._ranks
        known = rank.pool.match_prefix(hashes)
        missing = len(hashes) - len(known)
        new = rank.pool.allocate(missing) if len(known) >= start else None
        for block, digest in zip(new or (), hashes[len(known) :], strict=False):
            rank.pool.cache_block(block, digest)
        rank.pool.release([*known, *(new or ())])
        return [*(None for _ in known[start:]), *new] if new else []

    def counts(self) -> dict[str, int]:
        """Numbers for ``EngineStats``."""
        each = [rank.counts() for rank in self._ranks]
        total = {name: sum(counts[name] for counts in each) for name in each[0]}
        return total | {
            "page_len": each[0]["page_len"],
            "preemptions": total["preemptions"] + self._preemptions_before,
            "prefill_allowance": len(each) * self._planner.allowance,
        }

    def _allows_drafts(self) -> bool:
        # Beside prompts, rows without drafts cost next to nothing: all is computed in one pass.
        if any(rank.prefilling() for rank in self._ranks):
            return False
        return self._speculator.allows(max(rank.num_decoding() for rank in self._ranks))
