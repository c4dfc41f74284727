"""From body to plan, for models that the shared server does not have."""

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from inferneo_jax import Tokenizer
from server.api.openai.chat import prepare_chat
from server.api.openai.completions import prepare_completion
from server.http.errors import ApiError
from server.keys.caller import Caller
from server.observe.access_log import AccessLogEntry
from server.run.context import Context
from tests.support.fake_server import make_tokenizer


def context(*, strict: bool = False) -> Context:
    return Context(
        caller=Caller(),
        strict=strict,
        timeout=None,
        log_entry=AccessLogEntry(),
        cleanup=AsyncExitStack(),
    )


def registry(tokenizer: Tokenizer) -> Any:
    model = SimpleNamespace(tokenizer=tokenizer, engine=None, max_len=100, kind="decoder")
    return SimpleNamespace(language_model=lambda name, caller: model, output_parser="auto")


@pytest.mark.parametrize("style", ["<|fim_{}|>", "<fim_{}>"])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_suffix_is_filled_in_where_the_model_can(style: str, as_ids: bool) -> None:
    names = [style.format(part) for part in ("prefix", "suffix", "middle")]
    tokenizer = make_tokenizer(*names)
    prefix, suffix, middle = (tokenizer.encode(name)[0] for name in names)
    before = tokenizer.encode("def f")
    fields = {"model": "m", "prompt": before if as_ids else "def f", "suffix": "return"}
    answer = prepare_completion(registry(tokenizer), context(), fields)
    plan = answer.generation.plan
    assert list(plan.prompts[0].ids) == [
        prefix,
        *before,
        suffix,
        *tokenizer.encode("return"),
        middle,
    ]
    assert plan.text.suffix == ""
    assert answer.dialect.warnings == ()


def test_a_model_without_a_template_does_not_chat() -> None:
    fields = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(ApiError, match="/v1/completions") as caught:
        prepare_chat(registry(make_tokenizer(template=None)), context(), fields)
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_what_is_filled_in_cannot_be_scored_as_an_echo() -> None:
    tokenizer = make_tokenizer("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    fields = {"model": "m", "prompt": "def f", "suffix": "return", "echo": True}
    answer = prepare_completion(registry(tokenizer), context(), fields)
    assert answer.generation.plan.prompts[0].text == "def f"
    with pytest.raises(ApiError, match="suffix") as caught:
        prepare_completion(registry(tokenizer), context(), fields | {"logprobs": 0})
    assert (caught.value.status, caught.value.param) == (400, "suffix")


def test_template_variables_are_those_that_the_template_reads() -> None:
    template = "{% if enable_thinking %}think {% endif %}{{ bos_token }}{{ messages[0].content }}"
    tokenizer = make_tokenizer(template=template)
    given = {"enable_thinking": True, "bos_token": "changed", "other": 1}
    fields: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    fields["chat_template_kwargs"] = given
    answer = prepare_chat(registry(tokenizer), context(), fields)
    ids = answer.generation.plan.prompts[0].ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "think <|begin|>Hi"
    assert [warning.split()[0] for warning in answer.dialect.warnings] == [
        "chat_template_kwargs.bos_token",
        "chat_template_kwargs.other",
    ]
    with pytest.raises(ApiError, match=r"chat_template_kwargs\.bos_token"):
        prepare_chat(registry(tokenizer), context(strict=True), fields)
