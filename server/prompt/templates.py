"""A conversation as token ids, by the model's chat template."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.http.errors import bad_request

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer

_LONGEST_NAME = 100
_MOST_NAMED = 20


def conversation_ids(
    tokenizer: "Tokenizer",
    messages: list[dict[str, Any]],
    variables: Mapping[str, Any],
    warnings: list[str],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    strict: bool,
    add_special_tokens: bool = False,
) -> list[int]:
    """The token ids of a conversation. Rendering the template may block.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        variables: further variables of the template.
        warnings: gets one for each variable that the template does not read.
        add_generation_prompt: whether to open the assistant's message.
        continue_final_message: whether to leave the last message open.
        strict: whether to refuse what would be a warning.
        add_special_tokens: whether to add the tokens that the model expects around a text.

    Raises:
        ApiError, TemplateError: it cannot be written out as it stands.
    """
    if not tokenizer.has_chat_template:
        raise bad_request(
            "This model has no chat template; send a prompt to /v1/completions.", "model"
        )
    known = _known_variables(tokenizer, variables, warnings, strict=strict)
    written = tokenizer.render_chat(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **known,
    )
    # A template writes the special tokens itself.
    return tokenizer.encode(written, add_special_tokens=add_special_tokens)


def _known_variables(
    tokenizer: "Tokenizer", variables: Mapping[str, Any], warnings: list[str], *, strict: bool
) -> dict[str, Any]:
    """The variables that the chat template reads; nothing else reaches it.

    Raises:
        ApiError: there are others, and ``strict``.
    """
    known = tokenizer.template_variables
    for name in sorted(variables.keys() - known)[:_MOST_NAMED]:
        path = f"chat_template_kwargs.{name}"[:_LONGEST_NAME]
        finding = f"{path} is not a variable of the model's chat template"
        if strict:
            raise bad_request(f"{finding}. Remove it.", path)
        warnings.append(f"{finding}; ignored.")
    return {name: value for name, value in variables.items() if name in known}
