"""What the requests in the slots need of sampling, as the host knows it."""

from typing import Any

import numpy as np

from inferneo_jax.layers.sampler import Sampling, sampling_of
from inferneo_jax.models.steps import (
    DecodeInputs,
    MixedInputs,
    PrefillInputs,
    SlotState,
    VerifyInputs,
)

Indices = np.ndarray[Any, np.dtype[Any]]


class SlotSampling:
    """Chooses the programs that sample and score the rows of a step, so that no device has to.

    It reads the arguments of programs only, as numpy arrays: every process of a job chooses alike.

    Args:
        dp_size: number of data-parallel ranks.
        slots: number of slots of a rank.
        vocab_size: vocabulary size of the model.
    """

    def __init__(self, dp_size: int, slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kinds = np.full((dp_size, slots), Sampling.GREEDY, np.int8)
        self._scored = np.zeros((dp_size, slots), np.bool_)
        self._constrained = np.zeros((dp_size, slots), np.bool_)

    def admit(self, slots: Indices, admitted: SlotState) -> None:
        """Take the requests that ``Admit`` writes into slots, from its arguments."""
        at, live = self._places(slots)
        self._kinds[at] = sampling_of(admitted.sampling, self._vocab_size)[live]
        self._scored[at] = np.asarray(admitted.sampling.want_logprobs)[live]
        self._constrained[at] = np.asarray(admitted.sampling.constrained)[live]

    def kind(self, inputs: Any) -> Sampling:
        """The least kind of sampling that all rows of a forward pass can be sampled with."""
        kinds = [self._kinds[at].max(initial=Sampling.GREEDY) for at in self._sampled(inputs)]
        return Sampling(max(kinds))

    def scored(self, inputs: Any) -> bool:
        """Whether a row of a forward pass wants the log probabilities of what it samples."""
        return any(bool(self._scored[at].any()) for at in self._sampled(inputs))

    def constrained(self, inputs: Any) -> bool:
        """Whether a grammar says which tokens a row of a forward pass may sample."""
        return any(bool(self._constrained[at].any()) for at in self._sampled(inputs))

    def _sampled(self, inputs: Any) -> list[tuple[Indices, Indices]]:
        """Rank and slot of the rows that are sampled: for prefill, those that end their prompts."""
        match inputs:
            case MixedInputs(decode, prefill):
                return self._sampled(decode) + self._sampled(prefill)
            case PrefillInputs():
                ends = np.where(inputs.last, inputs.slots, self._kinds.shape[1])
                return [self._places(ends)[0]]
            case DecodeInputs() | VerifyInputs():
                return [self._places(inputs.slots)[0]]
        raise TypeError(f"{type(inputs).__name__} are not the inputs of a forward pass")

    def _places(self, slots: Any) -> tuple[tuple[Indices, Indices], Indices]:
        """Rank and slot of the rows that are not padding, and the indices of these rows."""
        dp_size, num_slots = self._kinds.shape
        (live,) = np.nonzero(slots < num_slots)
        return (live // (len(slots) // dp_size), slots[live]), live
