"""The engine's inputs and outputs: token ids in both directions, without text and without jax."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from inferneo_jax.errors import ContextLengthError, InferneoError, RequestError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits.

    The parameters are applied in this order: repetition, frequency and presence penalties; logit
    bias and banned tokens; temperature; then top-k, top-p and min-p on the tempered distribution.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. [0, 2]
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose total probability reaches this. (0, 1]
        min_p: keep tokens at least this likely, relative to the most likely one. [0, 1]
        frequency_penalty: subtracted from a logit for each time its token was generated. [-2, 2]
        presence_penalty: subtracted once from the logits of generated tokens. [-2, 2]
        repetition_penalty: divides positive and multiplies negative logits of tokens in the
            prompt or the output (CTRL, arXiv:1909.05858). (0, 10]
        logit_bias: added to the logits of these token ids. [-100, 100]
        seed: makes sampling reproducible; 64 bits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0, 2.0),
            "top_k": (0, 2**31 - 1),
            "min_p": (0.0, 1.0),
            "frequency_penalty": (-2.0, 2.0),
            "presence_penalty": (-2.0, 2.0),
            "seed": (0, 2**64 - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise RequestError(f"{name} is {value}; it must be from {low} to {high}", name)
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1", "top_p")
        if not 0.0 < self.repetition_penalty <= 10.0:
            raise RequestError(
                f"repetition_penalty is {self.repetition_penalty}; "
                "it must be above 0 and at most 10",
                "repetition_penalty",
            )
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias of token {token} is {bias}; it must be from -100 to 100",
                    "logit_bias",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """A grammar that the whole output must match; ``text/grammar.py`` makes them.

    At each position only those tokens can be sampled with which the output can still be completed.
    A stop token can be sampled only where the output matches, and an output that matches and
    cannot be continued ends by itself. Only ``max_tokens`` and other stop tokens cut it short.

    Attributes:
        grammar: as llguidance serializes it: JSON, ``{"grammars": [...]}``, whose entries are
            grammars in its variant of Lark (``lark_grammar``) or JSON schemas (``json_schema``).
    """

    grammar: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One sequence to generate. ``n`` choices are n requests, whose prompts share pages.

    Attributes:
        id: unique among the requests that are running or waiting.
        prompt: token ids, at least one.
        max_tokens: maximum number of tokens to generate; 0 only scores the prompt.
        stop_token_ids: generation ends when one of these is sampled, and this token is the last
            of the output. Includes the model's end-of-sequence ids unless these are to be ignored.
        min_tokens: stop tokens cannot be sampled before this many tokens are generated.
        logprobs: number of alternatives to report in addition to each sampled token; None reports
            no log probabilities at all.
        prompt_logprobs: the same for the tokens of the prompt.
        priority: among the requests of one owner, lower values run first; equal values run in order
            of arrival.
        cache_salt: requests share cached prefixes only with requests that have the same salt.
        owner: who sent the request; owners share the engine evenly.
        constraint: the grammar that the output must match; None: there is none.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: bytes = b""
    owner: str = ""
    constraint: Constraint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """The limits of one engine; ``max_len`` covers prompt and output together, in tokens."""

    vocab_size: int
    max_len: int
    max_logprobs: int
    max_logit_bias: int
    max_stop_ids: int

    def check(self, request: GenerationRequest) -> None:
        """Reject a request that could never be served.

        Raises:
            RequestError: a field is out of bounds; the error names the field and its bound.
            ContextLengthError: the request is too long.
        """
        self._check_ids(request)
        bias, stops = request.sampling.logit_bias, request.stop_token_ids
        bounds = {
            "max_tokens": (request.max_tokens, None),
            "min_tokens": (request.min_tokens, request.max_tokens),
            "logprobs": (request.logprobs or 0, self.max_logprobs),
            "prompt_logprobs": (request.prompt_logprobs or 0, self.max_logprobs),
            "the number of entries of logit_bias": (len(bias), self.max_logit_bias),
            "the number of entries of stop_token_ids": (len(stops), self.max_stop_ids),
        }
        for name, (value, high) in bounds.items():
            if value < 0 or (high is not None and value > high):
                limit = "at least 0" if high is None else f"from 0 to {high}"
                raise RequestError(f"{name} is {value}; it must be {limit}", name.split()[-1])
        prompt, length = len(request.prompt), len(request.prompt) + request.max_tokens
        if length > self.max_len:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and max_tokens is {request.max_tokens}, {length} "
                f"in all; the context holds {self.max_len}. Shorten the prompt or lower max_tokens",
                "max_tokens" if prompt < self.max_len else "prompt",
            )

    def _check_ids(self, request: GenerationRequest) -> None:
        if not request.prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        for name, ids in (
            ("prompt", (min(request.prompt), max(request.prompt))),
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
        ):
            if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
                raise RequestError(
                    f"{name} holds token id {wrong[0]}; ids go from 0 to {self.vocab_size - 1}",
                    name,
                )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability, in nats, under the model's own distribution.

    Sampling parameters do not affect it. ``top`` holds the most likely alternatives as
    (token id, log probability), the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOutput:
    """The output of one step for one request.

    Attributes:
        token_ids: new tokens, in order, including the stop token that ended the request.
        logprobs: one entry per new token, if requested.
        prompt_logprobs: one entry per prompt token (None for the first one), if requested; sent
            only once.
        cached_tokens: number of prompt tokens that were found in the prefix cache.
        admitted_at: when the request first got a slot, in seconds of ``time.monotonic``.
        finish_reason: set only in the last output.
        error: the cause, if ``finish_reason`` is "error": an ``EngineError``, or a
            ``ConstraintError`` where the request's own grammar is the cause.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0
    admitted_at: float | None = None
    finish_reason: FinishReason | None = None
    error: InferneoError | None = None


OutputSink = Callable[[GenerationOutput], None]
"""Receives a request's outputs on a thread of the engine; must return at once and never raise."""


@dataclass(slots=True)
class EngineTotals:
    """Counts of the steps and tokens that an engine has processed since it started."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    model_drafted_tokens: int = 0
    model_accepted_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A consistent snapshot of the engine between two steps. Pages hold ``page_len`` tokens.

    ``accepted_tokens`` counts those of the ``drafted_tokens`` that were sampled as well;
    ``model_drafted_tokens`` and ``model_accepted_tokens`` are those that the draft model drafted.
    ``itl_budget`` is in seconds; ``prefill_allowance`` is the number of prompt tokens that a step
    which decodes prefills at most now.
    """

    ready: bool
    slots: int
    slots_used: int
    pages: int
    pages_used: int
    pages_cached: int
    page_len: int
    running: int
    waiting: int
    itl_budget: float
    prefill_allowance: int
    steps: int
    compiles_after_ready: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    model_drafted_tokens: int
    model_accepted_tokens: int
