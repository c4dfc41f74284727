"""Prompts as token ids: texts, infilling, conversations, and the limits of the context."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from inferneo_jax import TemplateError
from server.http.errors import ApiError, bad_request

if TYPE_CHECKING:
    from inferneo_jax import LanguageModel, Tokenizer

PromptInput = str | list[int]
"""A text, or a list of token ids."""
DEFAULT_MAX_TOKENS = 16
"""Default maximum number of tokens of a completion."""
CONTEXT_IS = "This model's maximum context length is"
"""OpenAI's wording, by which LiteLLM and other clients recognize that the prompt is too long."""

SCORE_BYTES = 128
"""Memory per log probability until the answer has been sent, in bytes.

As JSON, one takes 83 bytes on average in chat answers (SmolLM2's vocabulary) and 30 in completions.
Those of an echoed prompt arrive from the engine all at once, and take 100 at their peak.
"""
MAX_SCORES = 256 * 2**20 // SCORE_BYTES
"""Maximum number of log probabilities in one answer, which take 256 MiB."""

_LONGEST_NAME = 100
_MOST_NAMED = 20

_FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt, ready for the engine.

    Attributes:
        ids: its token ids.
        text: the text that ``echo`` shows.
        added: number of leading ids that the tokenizer added and that the text does not show.
        max_tokens: maximum number of tokens to generate.
    """

    ids: tuple[int, ...]
    text: str = ""
    added: int = 0
    max_tokens: int


def completion_prompt(
    model: "LanguageModel",
    prompt: PromptInput,
    name: str,
    *,
    suffix: str,
    infill: tuple[int, int, int] | None,
    echo: bool,
    max_tokens: int | None,
) -> Prompt:
    """Tokenize one prompt of a completion request.

    Args:
        model: the model that the prompt is for.
        prompt: a text, or token ids, which are used unchanged.
        name: the name of the prompt in errors.
        suffix: the text that follows the completion.
        infill: the model's infill tokens, if it is to fill in the text before the suffix.
        echo: whether the answer repeats the prompt.
        max_tokens: maximum number of tokens to generate, if the request sets it.

    Raises:
        ApiError: the prompt does not fit the context, or is empty although it must not be.
    """
    tokenizer = model.tokenizer
    added = 0
    if infill is not None:
        before, behind, middle = infill
        ids = prompt
        if isinstance(ids, str):
            ids = tokenizer.encode(ids, add_special_tokens=False)
        after = tokenizer.encode(suffix, add_special_tokens=False)
        ids = [before, *ids, behind, *after, middle]
    elif isinstance(prompt, str):
        ids = tokenizer.encode(prompt) or _begin(tokenizer)
        bos = tokenizer.bos_token_id
        spelled = bos is not None and prompt.startswith(tokenizer.token_text(bos))
        added = int(not prompt or (ids[0] == bos and not spelled))
    else:
        ids = prompt
    text = prompt if isinstance(prompt, str) else ""
    if echo and not isinstance(prompt, str):
        text = tokenizer.decode(prompt, skip_special_tokens=False)
    limit = fit(len(ids), max_tokens, DEFAULT_MAX_TOKENS, model.max_len, name)
    return Prompt(ids=tuple(ids), text=text, added=added, max_tokens=limit)


def _begin(tokenizer: "Tokenizer") -> list[int]:
    """Return the tokens that stand for an empty prompt, since a model needs at least one token."""
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if tokenizer.eos_token_ids:
        return [min(tokenizer.eos_token_ids)]
    raise bad_request("prompt is empty, and this model has no token to begin with.", "prompt")


def infill_tokens(tokenizer: "Tokenizer") -> tuple[int, int, int] | None:
    """Return the infill tokens for prefix, suffix and middle; None if the model has none."""
    for names in _FILL_IN_THE_MIDDLE:
        ids = [tokenizer.encode(name, add_special_tokens=False) for name in names]
        if all(len(each) == 1 for each in ids):
            return ids[0][0], ids[1][0], ids[2][0]
    return None


def conversation_text(
    tokenizer: "Tokenizer",
    messages: list[dict[str, Any]],
    variables: Mapping[str, Any],
    warnings: list[str],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool,
    continue_final_message: bool,
    strict: bool,
) -> str:
    """Return the text of a conversation. Rendering the template may block.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        variables: additional variables for the template.
        warnings: receives a warning for each variable that the template does not read.
        tools: the tools that the model is told of.
        add_generation_prompt: whether to open a new assistant message.
        continue_final_message: whether to leave the last message open.
        strict: whether to raise an error instead of warning.

    Raises:
        ApiError, TemplateError: the template cannot render the conversation.
    """
    if not tokenizer.has_chat_template:
        raise bad_request(
            "This model has no chat template; send a prompt to /v1/completions.", "model"
        )
    known = _known_variables(tokenizer, variables, warnings, strict=strict)
    if tools:
        if "tools" in tokenizer.template_variables:
            known["tools"] = list(tools)
        else:
            unread = "tools is not read by the model's chat template, so the model has none"
            if strict:
                raise bad_request(
                    f"{unread}. Choose a model that was trained to call tools.", "tools"
                )
            warnings.append(f"{unread}.")
    render = partial(
        tokenizer.render_chat,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **known,
    )
    try:
        return render(messages)
    except TemplateError:
        # Most templates read the arguments of calls as an object, a few as its text.
        texts = [_with_texts(message) for message in messages]
        if texts == messages:
            raise
        return render(texts)


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as texts."""
    if not (calls := message.get("tool_calls")):
        return message
    written = []
    for call in calls:
        function = call["function"]
        if not isinstance(arguments := function["arguments"], str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        written.append(call | {"function": function | {"arguments": arguments}})
    return message | {"tool_calls": written}


def _known_variables(
    tokenizer: "Tokenizer", variables: Mapping[str, Any], warnings: list[str], *, strict: bool
) -> dict[str, Any]:
    """Return the variables that the chat template reads; it receives no others.

    Raises:
        ApiError: there are others, and ``strict`` is set.
    """
    known = tokenizer.template_variables
    for name in sorted(variables.keys() - known)[:_MOST_NAMED]:
        path = f"chat_template_kwargs.{name}"[:_LONGEST_NAME]
        finding = f"{path} is not a variable of the model's chat template"
        if strict:
            raise bad_request(f"{finding}. Remove it.", path)
        warnings.append(f"{finding}; ignored.")
    return {name: value for name, value in variables.items() if name in known}


def fit(length: int, limit: int | None, default: int, context: int, name: str) -> int:
    """Return the maximum number of tokens to generate after a prompt of ``length`` tokens.

    Args:
        length: length of the prompt.
        limit: the limit that the request sets; None if it sets none.
        default: the limit in that case, reduced to what is left of the context.
        context: the length of the model's context.
        name: the name of the prompt in errors.

    Raises:
        ApiError: the prompt and the limit together exceed the context.
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


def check_scores(
    prompts: Sequence[Prompt], sampled: int, logprobs: int, *, name: str, echo: bool, stream: bool
) -> None:
    """Reject a request whose log probabilities would take too much memory.

    A stream keeps few of the log probabilities that it generates, but a prompt's arrive at once.

    Args:
        prompts: the prompts of the request.
        sampled: number of sequences sampled for each prompt.
        logprobs: number of alternatives for each token.
        name: the field of the request that sets ``logprobs``, for errors.
        echo: whether the prompts are scored as well.
        stream: whether the answer is streamed.

    Raises:
        ApiError: there would be more than :data:`MAX_SCORES`.
    """
    read = sum(len(prompt.ids) for prompt in prompts) if echo else 0
    written = 0 if stream else sum(prompt.max_tokens for prompt in prompts)
    number = sampled * (read + written) * (1 + logprobs)
    if number <= MAX_SCORES:
        return
    tokens = "the prompt's tokens" if stream else "max_tokens, or set stream to true"
    raise bad_request(
        f"{name} asks for {1 + logprobs} log probabilities of each token. With {sampled} choices "
        f"for each prompt and {read + written} tokens to score for each choice, the answer may "
        f"hold {number}; at most {MAX_SCORES} are allowed. Lower {name}, n or {tokens}.",
        name,
    )


def _too_long(message: str, param: str) -> ApiError:
    return bad_request(message, param, "context_length_exceeded")
