"""A conversation as token ids, by the model's chat template."""

from typing import TYPE_CHECKING, Any

from server.api.openai.chat import Conversation
from server.http.errors import bad_request

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer

_LONGEST_NAME = 100
_MOST_NAMED = 20


def conversation_ids(
    tokenizer: "Tokenizer",
    body: Conversation,
    warnings: list[str],
    *,
    strict: bool,
    add_special_tokens: bool = False,
) -> list[int]:
    """The token ids of a conversation; adds to ``warnings``. Rendering the template may block.

    Raises:
        ApiError, TemplateError: it cannot be written out as it stands.
    """
    if not tokenizer.has_chat_template:
        raise bad_request(
            "This model has no chat template; send a prompt to /v1/completions.", "model"
        )
    variables = _template_variables(tokenizer, body, warnings, strict=strict)

    written = tokenizer.render_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message,
        **variables,
    )
    # A template writes the special tokens itself.
    return tokenizer.encode(written, add_special_tokens=add_special_tokens)


def _template_variables(
    tokenizer: "Tokenizer", body: Conversation, warnings: list[str], *, strict: bool
) -> dict[str, Any]:
    """Those of the request that the chat template reads; nothing else reaches it.

    Raises:
        ApiError: there are others, and ``strict``.
    """
    known = tokenizer.template_variables
    for name in sorted(body.chat_template_kwargs.keys() - known)[:_MOST_NAMED]:
        path = f"chat_template_kwargs.{name}"[:_LONGEST_NAME]
        finding = f"{path} is not a variable of the model's chat template"
        if strict:
            raise bad_request(f"{finding}. Remove it.", path)
        warnings.append(f"{finding}; ignored.")
    return {name: value for name, value in body.chat_template_kwargs.items() if name in known}
