"""What the host hands to a step: plans and requests written out as numpy arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from inferneo_jax.pages import NO_PAGE
from inferneo_jax.request import GenerationRequest
from inferneo_jax.sampling import SamplingRows
from inferneo_jax.scheduler import DecodeRow, PrefillChunk
from inferneo_jax.sequence import Sequence
from inferneo_jax.steps import DecodeRows, PrefillRows, SlotState

# The fields of rows are declared as the jax arrays that steps see; these builders fill them with
# numpy arrays, which a compiled step takes as well. Hence the Any.


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """Sizes of everything that is handed over; they never change while a model is loaded."""

    slots: int
    max_len: int
    max_pages: int
    vocab_size: int
    max_bias: int
    max_stops: int

    def empty_state(self) -> SlotState:
        """Slots without tokens, greedy and with no sampling feature in use."""
        rows = self.slots
        zeros: Any = np.zeros(rows, np.float32)
        ones: Any = np.ones(rows, np.float32)
        counts: Any = np.zeros(rows, np.int32)
        flags: Any = np.zeros(rows, np.bool_)
        unused: tuple[Any, Any, Any] = self._tables({}, frozenset())
        tiled: Any = [np.tile(table, (rows, 1)) for table in unused]
        bias_ids, bias, stop_ids = tiled
        seed: Any = np.zeros((rows, 2), np.uint32)
        tokens: Any = np.zeros((rows, self.max_len), np.int32)
        sampling = SamplingRows(
            temperature=zeros,
            top_k=counts,
            top_p=ones,
            min_p=zeros,
            frequency_penalty=zeros,
            presence_penalty=zeros,
            repetition_penalty=ones,
            seed=seed,
            prompt_len=counts,
            min_len=counts,
            want_logprobs=flags,
            want_prompt_logprobs=flags,
            bias_ids=bias_ids,
            bias=bias,
            stop_ids=stop_ids,
        )
        return SlotState(tokens, sampling)

    def slot_row(self, sequence: Sequence) -> SlotState:
        """One slot's content, without the leading axis: known tokens and parameters."""
        tokens: Any = np.zeros(self.max_len, np.int32)
        tokens[: sequence.num_known] = sequence.tokens
        return SlotState(tokens, self._sampling_row(sequence.request))

    def decode(self, rows: tuple[DecodeRow, ...], bucket: int) -> DecodeRows:
        """Rows of a decode step, padded to the bucket with rows that have no slot."""
        slots: Any = np.full(bucket, self.slots, np.int32)
        positions: Any = np.zeros(bucket, np.int32)
        tables: Any = np.full((bucket, self.max_pages), NO_PAGE, np.int32)
        for i, row in enumerate(rows):
            slots[i] = row.sequence.slot
            positions[i] = row.position
            tables[i, : len(row.sequence.pages)] = row.sequence.pages
        return DecodeRows(slots, positions, tables)

    def prefill(self, chunk: PrefillChunk | None) -> PrefillRows:
        """The row of a prefill step; None gives one of the same shape without a slot."""
        tables: Any = np.full((1, self.max_pages), NO_PAGE, np.int32)
        slot, start, length, sample = self.slots, 0, 1, False
        if chunk:
            assert chunk.sequence.slot is not None
            slot, start, length = chunk.sequence.slot, chunk.start, chunk.length
            sample = chunk.sample
            tables[0, : len(chunk.sequence.pages)] = chunk.sequence.pages
        numbers: Any = np.array([[slot], [start], [length]], np.int32)
        flags: Any = np.array([sample])
        return PrefillRows(numbers[0], numbers[1], numbers[2], flags, tables)

    def _sampling_row(self, request: GenerationRequest) -> SamplingRows:
        params = request.sampling
        bias_ids, bias, stop_ids = self._tables(params.logit_bias, request.stop_token_ids)

        def real(value: float) -> Any:
            return np.float32(value)

        def whole(value: int) -> Any:
            return np.int32(value)

        def flag(value: bool) -> Any:
            return np.bool_(value)

        seed: Any = np.array([params.seed >> 32, params.seed & 0xFFFFFFFF], np.uint32)
        return SamplingRows(
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
            want_prompt_logprobs=flag(request.prompt_logprobs is not None),
            bias_ids=bias_ids,
            bias=bias,
            stop_ids=stop_ids,
        )

    def _tables(self, logit_bias: Any, stop_token_ids: frozenset[int]) -> tuple[Any, Any, Any]:
        """Bias ids, biases and stop ids; unused entries name a token beyond the vocabulary."""
        bias_ids = np.full(self.max_bias, self.vocab_size, np.int32)
        bias = np.zeros(self.max_bias, np.float32)
        bias_ids[: len(logit_bias)] = list(logit_bias.keys())
        bias[: len(logit_bias)] = list(logit_bias.values())
        stop_ids = np.full(self.max_stops, self.vocab_size, np.int32)
        stop_ids[: len(stop_token_ids)] = sorted(stop_token_ids)
        return bias_ids, bias, stop_ids
