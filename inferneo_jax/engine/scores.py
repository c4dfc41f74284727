"""Log probabilities as the device gives them, for the requests that asked."""

from inferneo_jax.layers.sampler import Scores
from inferneo_jax.request import TokenLogprob
from inferneo_jax.scheduler.output import PrefillChunk


def token_logprob(scores: Scores, at: tuple[int, ...], token: int, num_top: int) -> TokenLogprob:
    """What ``scores`` say at an index of theirs, where ``token`` was chosen."""
    ids = scores.top_ids[at][:num_top].tolist()
    top = scores.top[at][:num_top].tolist()
    return TokenLogprob(token, float(scores.chosen[at]), tuple(zip(ids, top, strict=True)))


def keep_prompt_scores(chunk: PrefillChunk, scores: Scores | None, row: int) -> None:
    """Add a chunk's to its sequence's; a prompt that is computed twice is scored once.

    The scores of ``row`` at position i are of the token at i + 1.
    """
    request, known = chunk.sequence.request, chunk.sequence.prompt_scores
    if request.prompt_logprobs is None or scores is None:
        return
    for i in range(chunk.length):
        if len(known) == chunk.start + i + 1 < len(request.prompt):
            token = request.prompt[chunk.start + i + 1]
            known.append(token_logprob(scores, (row, i), token, request.prompt_logprobs))
