"""Builds the arguments of a step on the host: scheduled work and requests as numpy arrays.

Each array holds the same number of rows for every data-parallel rank, rank after rank. Slots and
pages are numbered from 0 within a rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from inferneo_jax.layers.sampler import SamplingParamsBatch
from inferneo_jax.models.steps import (
    DecodeInputs,
    MixedInputs,
    PrefillInputs,
    SlotState,
    VerifyInputs,
)
from inferneo_jax.request import GenerationRequest
from inferneo_jax.scheduler.block_pool import NULL_BLOCK
from inferneo_jax.scheduler.scheduler import DecodeRow, PrefillChunk
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.text.grammar import ConstrainedRow, fill_masks

# The fields of inputs are declared as the jax arrays that steps see. The builder fills them with
# numpy arrays, which a compiled step accepts as well; this is why they are typed as Any here.


@dataclass(frozen=True, kw_only=True)
class InputBuilder:
    """Builds the arguments of every program; their sizes are fixed while a model is loaded.

    Attributes:
        dp_size: number of data-parallel ranks, the size of the mesh's ``data`` axis.
        slots: number of slots of one rank.
        max_len: maximum number of tokens of a sequence.
        page_len: number of tokens of a page.
        vocab_size: vocabulary size of the model.
        mask_words: words of 32 bits that have one for each token, padding of the vocabulary
            included.
        max_bias: maximum number of biased tokens of a request.
        max_stops: maximum number of stop tokens of a request.
    """

    dp_size: int
    slots: int
    max_len: int
    page_len: int
    vocab_size: int
    mask_words: int
    max_bias: int
    max_stops: int

    @property
    def max_pages(self) -> int:
        """Maximum number of pages of a sequence."""
        return -(-self.max_len // self.page_len)

    def empty_state(self) -> SlotState:
        """The state of all slots before any request: no tokens, no pages, greedy sampling."""
        return self._empty_rows(self.dp_size * self.slots)

    def _empty_rows(self, rows: int) -> SlotState:
        def full(value: Any, dtype: type[np.generic]) -> Any:
            return np.full(rows, value, dtype)

        unused: tuple[Any, Any, Any] = self._token_lists({}, frozenset())
        tiled: Any = [np.tile(each, (rows, 1)) for each in unused]
        bias_ids, bias, stop_ids = tiled
        seed: Any = np.zeros((rows, 2), np.uint32)
        tokens: Any = np.zeros((rows, self.max_len), np.int32)
        block_tables: Any = np.full((rows, self.max_pages), NULL_BLOCK, np.int32)
        sampling = SamplingParamsBatch(
            temperature=full(0, np.float32),
            top_k=full(0, np.int32),
            top_p=full(1, np.float32),
            min_p=full(0, np.float32),
            frequency_penalty=full(0, np.float32),
            presence_penalty=full(0, np.float32),
            repetition_penalty=full(1, np.float32),
            seed=seed,
            prompt_len=full(0, np.int32),
            min_len=full(0, np.int32),
            want_logprobs=full(False, np.bool_),
            constrained=full(False, np.bool_),
            bias_ids=bias_ids,
            bias=bias,
            stop_ids=stop_ids,
        )
        return SlotState(tokens, block_tables, sampling)

    def slot_row(self, sequence: Sequence) -> SlotState:
        """The state of a slot that holds ``sequence``, without the axis of slots."""
        tokens: Any = np.zeros(self.max_len, np.int32)
        tokens[: sequence.num_known] = sequence.tokens()
        block_table: Any = np.full(self.max_pages, NULL_BLOCK, np.int32)
        block_table[: len(sequence.blocks)] = sequence.blocks
        return SlotState(tokens, block_table, self._sampling_row(sequence.request))

    def admit(self, ranks: Iterable[Iterable[Sequence]], bucket: int) -> tuple[Any, SlotState]:
        """The slots to which each rank admits sequences, and the state of these slots.

        Both are padded to ``bucket`` rows per rank with rows whose slot is beyond the last one.
        """
        slots: Any = np.full(self.dp_size * bucket, self.slots, np.int32)
        rows = self._empty_rows(self.dp_size * bucket)
        arrays = _arrays(rows)
        for rank, sequences in enumerate(ranks):
            for i, sequence in enumerate(sequences, start=rank * bucket):
                slots[i] = sequence.slot
                for array, value in zip(arrays, _arrays(self.slot_row(sequence)), strict=True):
                    array[i] = value
        return slots, rows

    def decode(
        self, ranks: Iterable[Iterable[DecodeRow]], bucket: int, num_steps: int = 1
    ) -> list[DecodeInputs]:
        """The inputs of decode steps that are dispatched together, padded like those of ``admit``.

        Rows that have fewer steps are padding in the others. Rows have the same places in each.
        """
        return self._ahead(ranks, bucket, num_steps, lambda row: row.num_steps)

    def _ahead(
        self,
        ranks: Iterable[Iterable[DecodeRow]],
        bucket: int,
        num_steps: int,
        count: Callable[[DecodeRow], int],
    ) -> list[DecodeInputs]:
        """The inputs of steps one after the other; each row takes part in its first ``count``."""
        by_rank = [tuple(rows) for rows in ranks]
        counts: Any = np.zeros(self.dp_size * bucket, np.int32)
        for rank, rows in enumerate(by_rank):
            counts[rank * bucket :][: len(rows)] = [count(row) for row in rows]
        slots, positions, pages = self._positions(by_rank, bucket, num_steps)
        steps = []
        for ahead in range(num_steps):
            taking_part: Any = np.where(counts > ahead, slots, np.int32(self.slots))
            # By how many pages the position lies beyond the first one's.
            index = (positions + ahead) // self.page_len - positions // self.page_len
            page: Any = np.take_along_axis(pages, index[:, None], axis=1)
            steps.append(DecodeInputs(taking_part, positions + np.int32(ahead), page))
        return steps

    def _positions(
        self, ranks: Iterable[Iterable[DecodeRow]], bucket: int, length: int
    ) -> tuple[Any, Any, Any]:
        """Slots, positions and pages of rows that write up to ``length`` positions each."""
        total = self.dp_size * bucket
        slots: Any = np.full(total, self.slots, np.int32)
        positions: Any = np.zeros(total, np.int32)
        # The first position may be the last of its page, so the rest begins on a new page.
        num_pages = -(-(length - 1) // self.page_len) + 1
        pages: Any = np.full((total, num_pages), NULL_BLOCK, np.int32)
        for rank, rows in enumerate(ranks):
            for i, row in enumerate(rows, start=rank * bucket):
                slots[i] = row.sequence.slot
                positions[i] = row.position
                first = row.position // self.page_len
                for j, page in enumerate(row.sequence.blocks[first : first + num_pages]):
                    pages[i, j] = page
        return slots, positions, pages

    def verify(
        self, ranks: Iterable[Iterable[DecodeRow]], bucket: int, max_draft: int
    ) -> VerifyInputs:
        """The inputs of a decode step with drafts of up to ``max_draft`` tokens."""
        total = self.dp_size * bucket
        drafts: Any = np.zeros((total, max_draft), np.int32)
        num_given: Any = np.zeros(total, np.int32)
        num_drafted: Any = np.zeros(total, np.int32)
        by_rank = [tuple(rows) for rows in ranks]
        for rank, rows in enumerate(by_rank):
            for i, row in enumerate(rows, start=rank * bucket):
                num_given[i], num_drafted[i] = len(row.draft), row.num_drafted
                drafts[i, : len(row.draft)] = row.draft
        positions = self._positions(by_rank, bucket, max_draft + 1)
        return VerifyInputs(*positions, drafts, num_given, num_drafted)

    def draft(
        self, ranks: Iterable[Iterable[DecodeRow]], bucket: int, num_tokens: int
    ) -> list[DecodeInputs]:
        """The inputs with which the draft model drafts each token of drafts up to that long.

        Rows whose draft ends before are padding. Rows have the same places in each.
        """
        return self._ahead(
            ranks, bucket, num_tokens, lambda row: row.num_drafted if row.by_model else 0
        )

    def prefill(self, ranks: Iterable[Iterable[PrefillChunk]], bucket: int) -> PrefillInputs:
        """The inputs of a prefill step, padded like those of ``admit``."""
        total = self.dp_size * bucket
        slots: Any = np.full(total, self.slots, np.int32)
        start: Any = np.zeros(total, np.int32)
        length: Any = np.ones(total, np.int32)
        sample: Any = np.zeros(total, np.bool_)
        scored: Any = np.zeros(total, np.bool_)
        for rank, chunks in enumerate(ranks):
            for i, chunk in enumerate(chunks, start=rank * bucket):
                slots[i] = chunk.sequence.slot
                start[i], length[i], sample[i] = chunk.start, chunk.length, chunk.sample
                scored[i] = chunk.sequence.request.prompt_logprobs is not None
        return PrefillInputs(slots, start, length, sample, scored)

    def mixed(
        self,
        decode: Iterable[Iterable[DecodeRow]],
        bucket: int,
        prefill: Iterable[Iterable[PrefillChunk]],
        prefill_bucket: int,
    ) -> MixedInputs:
        """The inputs of a step that decodes and prefills at once.

        The decode rows of a rank are sampled first, then its chunks. They fit in ``bucket`` rows,
        because each has a slot.
        """
        rows = [tuple(each) for each in decode]
        chunks = [tuple(each) for each in prefill]
        sampled: Any = np.full(self.dp_size * bucket, bucket + prefill_bucket, np.int32)
        for rank in range(self.dp_size):
            ends = [*range(len(rows[rank])), *range(bucket, bucket + len(chunks[rank]))]
            sampled[rank * bucket :][: len(ends)] = ends
        (newest,) = self.decode(rows, bucket)
        return MixedInputs(newest, self.prefill(chunks, prefill_bucket), sampled)

    def masks(self, rows: int, constrained: Iterable[ConstrainedRow]) -> Any:
        """Which tokens each of ``rows`` rows per rank may sample, as bits: any, unless it says so.

        Blocks until the masks are computed, in several threads.

        Args:
            rows: rows that are sampled on each rank.
            constrained: those with a grammar; their places count the rows of all ranks.

        Returns:
            uint32 ``[ranks * rows, mask_words]``, an array that nobody else writes to.
        """
        masks = np.full((self.dp_size * rows, self.mask_words), 2**32 - 1, np.uint32)
        fill_masks(constrained, masks)
        return masks

    def _sampling_row(self, request: GenerationRequest) -> SamplingParamsBatch:
        params = request.sampling
        bias_ids, bias, stop_ids = self._token_lists(params.logit_bias, request.stop_token_ids)

        def real(value: float) -> Any:
            return np.float32(value)

        def whole(value: int) -> Any:
            return np.int32(value)

        def flag(value: bool) -> Any:
            return np.bool_(value)

        seed: Any = np.array([params.seed >> 32, params.seed & 0xFFFFFFFF], np.uint32)
        return SamplingParamsBatch(
            temperature=real(params.temperature),
            top_k=whole(min(params.top_k, self.vocab_size)),
            top_p=real(params.top_p),
            min_p=real(params.min_p),
            frequency_penalty=real(params.frequency_penalty),
            presence_penalty=real(params.presence_penalty),
            repetition_penalty=real(params.repetition_penalty),
            seed=seed,
            prompt_len=whole(len(request.prompt)),
            min_len=whole(len(request.prompt) + request.min_tokens),
            want_logprobs=flag(request.logprobs is not None),
            constrained=flag(request.constraint is not None),
            bias_ids=bias_ids,
            bias=bias,
            stop_ids=stop_ids,
        )

    def _token_lists(self, logit_bias: Any, stop_token_ids: frozenset[int]) -> tuple[Any, Any, Any]:
        """Bias ids, biases and stop ids; unused entries name a token beyond the vocabulary."""
        bias_ids = np.full(self.max_bias, self.vocab_size, np.int32)
        bias = np.zeros(self.max_bias, np.float32)
        bias_ids[: len(logit_bias)] = list(logit_bias.keys())
        bias[: len(logit_bias)] = list(logit_bias.values())
        stop_ids = np.full(self.max_stops, self.vocab_size, np.int32)
        stop_ids[: len(stop_token_ids)] = sorted(stop_token_ids)
        return bias_ids, bias, stop_ids


def _arrays(state: SlotState) -> tuple[Any, ...]:
    return (state.tokens, state.block_tables, *state.sampling)
