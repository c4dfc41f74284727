"""What the engine brought, cut into portions that the event loop handles without a pause."""

import dataclasses
from collections.abc import Iterator

from inferneo_jax import GenerationOutput

PORTION = 400
"""Most records handled at once: tokens, and alternatives of which the log probability is told."""

Arrived = tuple[int, GenerationOutput, float]
"""What came for a choice, and when."""


def portions(arrived: list[Arrived]) -> Iterator[list[Arrived]]:
    """The same outputs in lists of about :data:`PORTION` records each, one at least."""
    portion: list[Arrived] = []
    size = 0
    for index, output, when in arrived:
        for part in _parts(output):
            portion.append((index, part, when))
            size += _weight(part)
            if size >= PORTION:
                yield portion
                portion, size = [], 0
    if portion or not arrived:
        yield portion


def _weight(output: GenerationOutput) -> int:
    scores = output.logprobs or output.prompt_logprobs
    each = 1 + (len(scores[-1].top) if scores and scores[-1] else 0)
    return each * (len(output.token_ids) + len(output.prompt_logprobs or ()))


def _parts(output: GenerationOutput) -> Iterator[GenerationOutput]:
    """An output with a long prompt's log probabilities as several; its tokens are in the last."""
    scores = output.prompt_logprobs
    if scores is None or (weight := _weight(output)) <= PORTION:
        yield output
        return
    step = max(1, len(scores) * PORTION // weight)
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        if start + step < len(scores):
            yield GenerationOutput(prompt_logprobs=part)
        else:
            yield dataclasses.replace(output, prompt_logprobs=part)
