"""Prompts as token ids: beginnings, middles to fill in, and what fits the context."""

from typing import TYPE_CHECKING

from server.choice import Prompt
from server.errors import ApiError, bad_request
from server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionBody, PromptInput

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel, Tokenizer

CONTEXT_IS = "This model's maximum context length is"
"""OpenAI's words, by which LiteLLM and others know that a shorter prompt would do."""

_FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


def completion_prompt(
    model: "LanguageModel",
    body: CompletionBody,
    prompt: PromptInput,
    index: int,
    infill: tuple[int, int, int] | None,
) -> Prompt:
    """One prompt of a request, of which it is number ``index``.

    Args:
        model: whom it is for.
        body: the request.
        prompt: a text, or token ids as they are.
        index: its place among the request's prompts.
        infill: the model's tokens for filling in, if that is what the suffix is for.

    Raises:
        ApiError: it does not fit the context, or is empty where it must not be.
    """
    tokenizer = model.tokenizer
    added = 0
    if infill is not None:
        before, behind, middle = infill
        ids = prompt
        if isinstance(ids, str):
            ids = tokenizer.encode(ids, add_special_tokens=False)
        after = tokenizer.encode(body.suffix, add_special_tokens=False)
        ids = [before, *ids, behind, *after, middle]
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt) or _begin(tokenizer)
        bos = tokenizer.bos_token_id
        spelled = bos is not None and prompt.startswith(tokenizer.token_text(bos))
        added = int(not prompt or (ids[0] == bos and not spelled))
    else:
        ids = prompt
    text = prompt if isinstance(prompt, str) else ""
    if body.echo and not isinstance(prompt, str):
        text = tokenizer.decode(prompt, skip_special_tokens=False)
    name = f"prompt[{index}]" if len(body.prompt) > 1 else "prompt"
    limit = fit(len(ids), body.token_limit, DEFAULT_MAX_TOKENS, model.max_len, name)
    return Prompt(ids=tuple(ids), text=text, added=added, max_tokens=limit)


def _begin(tokenizer: "Tokenizer") -> list[int]:
    """The tokens of an empty prompt: a model cannot begin from nothing."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if tokenizer.eos_token_ids:
        return [min(tokenizer.eos_token_ids)]
    raise bad_request("prompt is empty, and this model has no token to begin with.", "prompt")


def infill_tokens(tokenizer: "Tokenizer") -> tuple[int, int, int] | None:
    """The tokens around prefix, suffix and middle, of a model that was trained with such."""
    for names in _FILL_IN_THE_MIDDLE:
        ids = [tokenizer.encode(name, add_special_tokens=False) for name in names]
        if all(len(each) == 1 for each in ids):
            return ids[0][0], ids[1][0], ids[2][0]
    return None


def fit(length: int, limit: int | None, default: int, context: int, name: str) -> int:
    """The most tokens to generate after a prompt of ``length`` tokens.

    Args:
        length: of the prompt.
        limit: what the client asked for.
        default: if it did not, or what is left of the context if that is less.
        context: the model's.
        name: the prompt's, in an error.

    Raises:
        ApiError: prompt and limit do not fit the context.
    """
    if length + (1 if limit is None else limit) <= context:
        return min(default, context - length) if limit is None else limit
    if length >= context:
        message = (
            f"{name} has {length} tokens. {CONTEXT_IS} {context} tokens, the answer included. "
            "Shorten it."
        )
        raise _too_long(message, name)
    raise _too_long(
        f"{name} has {length} tokens and max_tokens is {limit}, {length + (limit or 0)} in all. "
        f"{CONTEXT_IS} {context} tokens. Shorten the prompt, or lower max_tokens to at most "
        f"{context - length}.",
        "max_tokens",
    )


def _too_long(message: str, param: str) -> ApiError:
    return bad_request(message, param, "context_length_exceeded")
