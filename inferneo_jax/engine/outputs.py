"""What a step brought, sequence by sequence."""

from collections.abc import Iterator
from dataclasses import dataclass

from inferneo_jax.engine.scores import keep_prompt_scores, token_logprob
from inferneo_jax.layers.sampler import Scores
from inferneo_jax.models.steps import Sampled
from inferneo_jax.request import TokenLogprob
from inferneo_jax.scheduler.output import SchedulerOutputs
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.scheduler.speculation import accepted

Results = tuple[Sampled | None, Sampled | None]
"""What a step's decode and prefill sampled; None: it had none."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a step brought for one sequence.

    Attributes:
        sequence: whose it is.
        tokens: sampled, in order.
        scores: of all rows of the step; the token i has those at ``places[i]``.
        places: as many as tokens.
        drafted: tokens of the draft that the step verified.
        prefilled: tokens of the prompt that it computed.
        ends: with these the prompt is complete.
    """

    sequence: Sequence
    tokens: list[int]
    scores: Scores
    places: list[tuple[int, ...]]
    drafted: int = 0
    prefilled: int = 0
    ends: bool = False

    def logprobs(self, count: int) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the first so many tokens; None where nobody asked."""
        if (num_top := self.sequence.request.logprobs) is None:
            return None
        found = zip(self.tokens[:count], self.places, strict=False)
        return tuple(token_logprob(self.scores, at, token, num_top) for token, at in found)


def results_of(
    scheduled: SchedulerOutputs, decode: Sampled | None, prefill: Sampled | None
) -> Iterator[Result]:
    """The results of a step, read; a prompt's scores are added to its sequence's.

    Args:
        scheduled: what the step ran; the rows of the results are split evenly over its ranks.
        decode: ids ``[rows]``, or ``[rows, tokens]`` where drafts were verified.
        prefill: of the rows that ran prompts.
    """
    if decode:
        ids = decode.ids.tolist()
        for rank, work in enumerate(scheduled):
            for i, row in enumerate(work.decode, start=rank * (len(ids) // len(scheduled))):
                if isinstance(ids[i], int):
                    yield Result(row.sequence, [ids[i]], decode.scores, [(i,)])
                    continue
                tokens = accepted(row.draft, ids[i])
                places: list[tuple[int, ...]] = [(i, j) for j in range(len(tokens))]
                yield Result(row.sequence, tokens, decode.scores, places, drafted=len(row.draft))
    if prefill:
        ids = prefill.ids.tolist()
        for rank, work in enumerate(scheduled):
            for i, chunk in enumerate(work.prefill, start=rank * (len(ids) // len(scheduled))):
                keep_prompt_scores(chunk, prefill.prompt_scores, i)
                yield Result(
                    chunk.sequence,
                    [ids[i]] if chunk.sample else [],
                    prefill.scores,
                    [(i,)] if chunk.sample else [],
                    prefilled=chunk.length,
                    ends=chunk.ends_prompt and chunk.sequence.request.max_tokens == 0,
                )
