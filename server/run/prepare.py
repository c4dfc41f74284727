"""From a request body to an answer that only needs to be run: validate, tokenize, fit.

All of this may run in a thread of :class:`~server.prompt.cpu_pool.CpuPool`.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from inferneo_jax import SamplingParams
from server.api.openai.chat import ChatBody, ChatDialect
from server.api.openai.common import Body, GenerationBody
from server.api.openai.completions import CompletionBody, CompletionDialect
from server.http.errors import as_api_error, bad_request
from server.keys.caller import Caller
from server.prompt.prompts import check_scores, completion_prompt, fit, infill_tokens
from server.prompt.templates import conversation_ids
from server.run.answer import Answer
from server.run.dialect import Dialect
from server.run.generation import Generation, Plan
from server.run.output import Prompt, TextOptions

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel
    from server.models.registry import Registry

_LONGEST_NAME = 100
_MOST_NAMED = 20
"""Most unknown parameters that the warnings name."""

Prepare = Callable[..., Answer]
"""One of the two functions below: ``(registry, caller, fields, strict=...)``."""

AnyBody = TypeVar("AnyBody", bound=Body)


def validate(kind: type[AnyBody], fields: Any, *, strict: bool) -> tuple[AnyBody, list[str]]:
    """The validated body, and warnings about names in it that are not known.

    Raises:
        ApiError: a field is missing or wrong, or a name is not known, and ``strict``.
    """
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise as_api_error(error) from None
    unknown = body.unknown()
    if unknown and strict:
        raise bad_request(
            f"{unknown[0][:_LONGEST_NAME]} is not a parameter of this endpoint. Remove it, or "
            "leave out the header X-Inferneo-Strict.",
            unknown[0][:_LONGEST_NAME],
        )
    named = [name[:_LONGEST_NAME] for name in unknown[:_MOST_NAMED]]
    warnings = [f"{name} is not a parameter of this endpoint; ignored." for name in named]
    if len(unknown) > _MOST_NAMED:
        rest = len(unknown) - _MOST_NAMED
        warnings.append(f"{rest} more are not parameters of this endpoint; ignored.")
    return body, warnings


def prepare_completion(
    registry: "Registry", caller: Caller, fields: Any, *, strict: bool
) -> Answer:
    """The answer to a request of ``/v1/completions``.

    Raises:
        ApiError, RequestError: it cannot be served as it stands.
    """
    body, warnings = validate(CompletionBody, fields, strict=strict)
    model = registry.language_model(body.model, caller)
    infill = infill_tokens(model.tokenizer) if body.suffix else None
    suffix = "" if infill else body.suffix
    if infill and body.echo and body.logprobs is not None:
        raise bad_request(
            "suffix cannot be filled in with both echo and logprobs: what the model reads is not "
            "the text that is echoed. Leave out one of the three.",
            "suffix",
        )
    if suffix:
        warnings.append("suffix was appended to the text: this model cannot fill in a middle.")

    return _answer(
        model,
        caller,
        body,
        CompletionDialect,
        "cmpl",
        warnings,
        [completion_prompt(model, body, prompt, i, infill) for i, prompt in enumerate(body.prompt)],
        num_choices=body.num_sampled,
        logprobs=body.logprobs,
        echo=body.echo,
        suffix=suffix,
    )


def prepare_chat(registry: "Registry", caller: Caller, fields: Any, *, strict: bool) -> Answer:
    """The answer to a request of ``/v1/chat/completions``.

    Raises:
        ApiError, RequestError: it cannot be served as it stands.
    """
    body, warnings = validate(ChatBody, fields, strict=strict)
    model = registry.language_model(body.model, caller)
    ids = tuple(conversation_ids(model.tokenizer, body, warnings, strict=strict))
    if not ids:
        raise bad_request("messages: the chat template made an empty prompt of them.", "messages")
    max_tokens = fit(len(ids), body.token_limit, model.max_len, model.max_len, "messages")
    return _answer(
        model,
        caller,
        body,
        ChatDialect,
        "chatcmpl",
        warnings,
        [Prompt(ids=ids, max_tokens=max_tokens)],
        num_choices=body.n,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _answer(
    model: "LanguageModel",
    caller: Caller,
    body: GenerationBody,
    dialect: type[Dialect],
    prefix: str,
    warnings: list[str],
    prompts: Sequence[Prompt],
    *,
    num_choices: int,
    logprobs: int | None,
    echo: bool = False,
    suffix: str = "",
) -> Answer:
    if logprobs is not None:
        name = "top_logprobs" if logprobs and isinstance(body, ChatBody) else "logprobs"
        check_scores(prompts, num_choices, logprobs, name=name, echo=echo, stream=body.stream)
    answer_id = f"{prefix}-{secrets.token_hex(12)}"
    stop_token_ids = frozenset(body.stop_token_ids)
    if not body.ignore_eos:
        stop_token_ids |= model.tokenizer.eos_token_ids
    plan = Plan(
        id=answer_id,
        prompts=tuple(prompts),
        num_choices=num_choices,
        sampling=_sampling(body),
        stop_token_ids=stop_token_ids,
        text=TextOptions(
            stops=tuple(body.stop),
            include_stop=body.include_stop_str_in_output,
            min_tokens=body.min_tokens,
            stop_token_ids=stop_token_ids,
            skip_special_tokens=body.skip_special_tokens,
            logprobs=logprobs is not None,
            echo=echo,
            suffix=suffix,
        ),
        logprobs=logprobs,
        ranked=num_choices > body.n,
        priority=body.priority,
        cache_salt=caller.cache_salt(body.cache_salt),
        owner=caller.id or "",
    )
    return Answer(
        caller=caller,
        generation=Generation(model.engine, model.tokenizer, plan),
        dialect=dialect(
            id=answer_id,
            created=int(time.time()),
            model=body.model,
            with_logprobs=logprobs is not None,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            warnings=(*warnings, *body.notes()),
        ),
        stream=body.stream,
        num_returned=body.n,
        user=body.user,
    )


def _sampling(body: GenerationBody) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
    )
