"""A request's state on the host: its tokens, its slot and blocks, and its deliveries."""

import logging
from dataclasses import dataclass, field

from inferneo_jax.errors import InferneoError
from inferneo_jax.request import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    OutputSink,
    TokenLogprob,
)
from inferneo_jax.scheduler.block_pool import hash_block, salt_hash
from inferneo_jax.text.grammar import Matcher

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine. The scheduler alone changes its tokens, slot, blocks and counts.

    A step is dispatched before the step before it is read, so the counts run ahead of ``output``.

    Attributes:
        request: the request as it was submitted.
        sink: receives its outputs.
        order: arrival number, unique.
        output: generated tokens that the host knows.
        dp_rank: the data-parallel rank that serves it.
        slot: row of its rank's state; None while waiting.
        blocks: of the KV cache, in order of position.
        prefill_len: number of tokens to prefill: all that were known when it got its slot.
        num_computed: leading tokens whose keys and values are written, or will be by a step in
            flight. During decode, the position of the newest token.
        num_draft_computed: leading tokens of which the draft model has keys and values, counted
            likewise.
        num_sampled: output tokens sampled, including those of a step in flight.
        num_cached_blocks: leading blocks that are in the prefix cache, for others to share.
        cached_tokens: prompt tokens found in the prefix cache at its first admission; None before.
        admitted_at: time of the first admission, in seconds of ``time.monotonic``.
        prompt_logprobs: of the prompt's tokens, as far as they are known; the first token has none.
        matcher: follows the output through the request's grammar; None without one. It has
            consumed the tokens that the host knows.
        paused: whether to decode no further tokens for now; it keeps its slot and blocks.
        started: whether an output was delivered.
        finished: whether the last output was delivered.
    """

    request: GenerationRequest
    sink: OutputSink
    order: int
    output: list[int] = field(default_factory=list)
    dp_rank: int = 0
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    prefill_len: int = 0
    num_computed: int = 0
    num_draft_computed: int = 0
    num_sampled: int = 0
    num_cached_blocks: int = 0
    cached_tokens: int | None = None
    admitted_at: float | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    matcher: Matcher | None = None
    paused: bool = False
    started: bool = False
    finished: bool = False
    _hashes: list[bytes] = field(default_factory=list)

    def tokens(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Known tokens at positions ``start`` to ``stop``, of the prompt and then the output."""
        prompt = self.request.prompt
        stop = self.num_known if stop is None else stop
        output = self.output[max(0, start - len(prompt)) : max(0, stop - len(prompt))]
        return [*prompt[start:stop], *output]

    @property
    def num_known(self) -> int:
        """Length of prompt and known output."""
        return len(self.request.prompt) + len(self.output)

    @property
    def urgency(self) -> tuple[int, int]:
        """The sequence with the smaller value runs first and is preempted last."""
        return self.request.priority, self.order

    @property
    def in_prefill(self) -> bool:
        """Whether it holds a slot and has tokens left to prefill."""
        return self.slot is not None and self.num_computed < self.prefill_len

    @property
    def num_missing(self) -> int:
        """Number of tokens left to prefill, while it holds a slot."""
        return max(0, self.prefill_len - self.num_computed)

    @property
    def can_decode(self) -> bool:
        """Whether a decode step can sample its next token."""
        return (
            self.slot is not None
            and not self.paused
            and self.num_computed >= self.prefill_len
            and self.num_sampled < self.request.max_tokens
        )

    def block_hashes(self, block_len: int, num_tokens: int) -> list[bytes]:
        """Hashes of the full blocks of the first ``num_tokens`` known tokens."""
        full, known = num_tokens // block_len, len(self._hashes)
        if known < full:
            tokens = self.tokens(known * block_len, full * block_len)
            for start in range(0, len(tokens), block_len):
                previous = self._hashes[-1] if self._hashes else salt_hash(self.request.cache_salt)
                self._hashes.append(hash_block(previous, tokens[start : start + block_len]))
        return self._hashes[:full]

    def deliver(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        reason: FinishReason | None = None,
        error: InferneoError | None = None,
    ) -> None:
        """Hand an output to the sink; with a reason it is the last, and later ones are dropped."""
        if self.finished:
            return
        scored = not self.started and self.request.prompt_logprobs is not None
        self.started, self.finished = True, reason is not None
        output = GenerationOutput(
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=tuple(self.prompt_logprobs) if scored else None,
            cached_tokens=self.cached_tokens or 0,
            admitted_at=self.admitted_at,
            finish_reason=reason,
            error=error,
        )
        try:
            self.sink(output)
        except Exception:
            log.exception("the sink of request %s raised", self.request.id)


def prompt_hashes(request: GenerationRequest, block_len: int) -> list[bytes]:
    """Hashes of the full blocks that a prompt may find in the cache: its last token is computed."""
    sequence = Sequence(request, lambda _: None, 0)
    return sequence.block_hashes(block_len, len(request.prompt) - 1)
