"""What a step sampled, read from its arrays sequence by sequence."""

from collections.abc import Iterator
from dataclasses import dataclass

from inferneo_jax.layers.sampler import Scores
from inferneo_jax.request import TokenLogprob
from inferneo_jax.runner.runner import StepResults
from inferneo_jax.scheduler.scheduler import PrefillChunk, SchedulerOutputs
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import accepted_tokens


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a step brought for one sequence.

    Attributes:
        sequence: the sequence.
        tokens: sampled tokens, in order.
        scores: scores of all rows of the step; those of token ``i`` are at ``indices[i]``.
            None if no request of the step asked for any.
        indices: one for each token.
        num_drafted: length of the draft that the step verified.
        by_model: whether the draft model made it.
        num_prefilled: prompt tokens that the step computed.
        ends: whether the request ends with its prompt, since it asks for no token.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    scores: Scores | None
    indices: list[tuple[int, ...]]
    num_drafted: int = 0
    by_model: bool = False
    num_prefilled: int = 0
    ends: bool = False

    def logprobs(self, count: int) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the first ``count`` tokens; None if they were not asked for."""
        num_top, scores = self.sequence.request.logprobs, self.scores
        if not count or num_top is None or scores is None:
            return None
        found = zip(self.tokens[:count], self.indices, strict=False)
        return tuple(_token_logprob(scores, at, token, num_top) for token, at in found)


def read_results(scheduled: SchedulerOutputs, results: StepResults) -> Iterator[SequenceResult]:
    """Yield the results of a step, and add the scores of prompts to their sequences.

    Args:
        scheduled: what the step ran; the rows of the arrays are split evenly over its ranks.
        results: the ids of its decode rows are ``[rows]``, or ``[rows, tokens]`` where drafts were
            verified or several steps were dispatched together.
    """
    decode, prefill = results.decode, results.prefill
    by_model = [] if results.drafts is None else results.drafts.tolist()
    if decode:
        ids = decode.ids.tolist()
        for rank, output in enumerate(scheduled):
            for i, row in enumerate(output.decode, start=rank * (len(ids) // len(scheduled))):
                if isinstance(ids[i], int):
                    yield SequenceResult(row.sequence, (ids[i],), decode.scores, [(i,)])
                    continue
                draft = by_model[i][: row.num_drafted] if row.by_model else row.draft
                several = tuple(ids[i][: row.num_steps])
                tokens = accepted_tokens(draft, ids[i]) if draft else several
                yield SequenceResult(
                    row.sequence,
                    tokens,
                    decode.scores,
                    [(i, j) for j in range(len(tokens))],
                    num_drafted=row.num_drafted,
                    by_model=row.by_model,
                )
    if prefill:
        ids = prefill.ids.tolist()
        for rank, output in enumerate(scheduled):
            for i, chunk in enumerate(output.prefill, start=rank * (len(ids) // len(scheduled))):
                _add_prompt_logprobs(chunk, prefill.prompt_scores, i)
                yield SequenceResult(
                    chunk.sequence,
                    (ids[i],) if chunk.sample else (),
                    prefill.scores,
                    [(i,)],
                    num_prefilled=chunk.length,
                    ends=chunk.ends_prompt and chunk.sequence.request.max_tokens == 0,
                )


def _token_logprob(scores: Scores, at: tuple[int, ...], token: int, num_top: int) -> TokenLogprob:
    """The log probability of ``token``, chosen at an index of the scores, and the top ones."""
    ids = scores.top_ids[at][:num_top].tolist()
    top = scores.top[at][:num_top].tolist()
    return TokenLogprob(token, float(scores.chosen[at]), tuple(zip(ids, top, strict=True)))


def _add_prompt_logprobs(chunk: PrefillChunk, scores: Scores | None, row: int) -> None:
    """Add those of a chunk to its sequence, once: a preempted prompt is computed twice.

    The scores of ``row`` at position i of the chunk are of the token at i + 1.
    """
    request, known = chunk.sequence.request, chunk.sequence.prompt_logprobs
    if request.prompt_logprobs is None or scores is None:
        return
    for i in range(chunk.length):
        if len(known) == chunk.start + i + 1 < len(request.prompt):
            token = request.prompt[chunk.start + i + 1]
            known.append(_token_logprob(scores, (row, i), token, request.prompt_logprobs))
