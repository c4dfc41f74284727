"""From body to plan, for models that the shared server does not have."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import TIMEOUT
from harness import make_tokenizer

from inferneo_jax import Tokenizer
from server.errors import ApiError
from server.prepare import prepare_chat, prepare_completion
from server.text import TextWork


def registry(tokenizer: Tokenizer) -> Any:
    model = SimpleNamespace(tokenizer=tokenizer, engine=None, max_len=100, kind="decoder")
    return SimpleNamespace(language_model=lambda name: model)


@pytest.fixture
def text() -> TextWork:
    return TextWork()


@pytest.mark.parametrize("style", ["<|fim_{}|>", "<fim_{}>"])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_a_suffix_is_filled_in_where_the_model_can(
    text: TextWork, style: str, as_ids: bool
) -> None:
    names = [style.format(part) for part in ("prefix", "suffix", "middle")]
    tokenizer = make_tokenizer(*names)
    prefix, suffix, middle = (tokenizer.encode(name)[0] for name in names)
    before = tokenizer.encode("def f")
    fields = {"model": "m", "prompt": before if as_ids else "def f", "suffix": "return"}
    answer = await prepare_completion(registry(tokenizer), text, fields, strict=False)
    plan = answer.generation.plan
    assert list(plan.prompts[0].ids) == [
        prefix,
        *before,
        suffix,
        *tokenizer.encode("return"),
        middle,
    ]
    assert plan.text.suffix == ""
    assert answer.shape.warnings == ()


async def test_a_model_without_a_template_does_not_chat(text: TextWork) -> None:
    fields = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(ApiError, match="/v1/completions") as caught:
        await prepare_chat(registry(make_tokenizer(template=None)), text, fields, strict=False)
    assert (caught.value.status, caught.value.param) == (400, "model")


async def test_text_that_takes_too_long_is_given_up(
    text: TextWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.text.BUDGET_SECONDS", 0.01)
    given_up = threading.Event()
    with pytest.raises(ApiError, match="shorten it"):
        await text.run(10_000, lambda: given_up.wait(TIMEOUT))
    given_up.set()
    text.close()


async def test_what_is_filled_in_cannot_be_scored_as_an_echo(text: TextWork) -> None:
    tokenizer = make_tokenizer("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    fields = {"model": "m", "prompt": "def f", "suffix": "return", "echo": True}
    answer = await prepare_completion(registry(tokenizer), text, fields, strict=False)
    assert answer.generation.plan.prompts[0].text == "def f"
    with pytest.raises(ApiError, match="suffix") as caught:
        await prepare_completion(registry(tokenizer), text, fields | {"logprobs": 0}, strict=False)
    assert (caught.value.status, caught.value.param) == (400, "suffix")


async def test_template_variables_are_those_that_the_template_reads(text: TextWork) -> None:
    template = "{% if enable_thinking %}think {% endif %}{{ bos_token }}{{ messages[0].content }}"
    tokenizer = make_tokenizer(template=template)
    given = {"enable_thinking": True, "bos_token": "changed", "other": 1}
    fields: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    fields["chat_template_kwargs"] = given
    answer = await prepare_chat(registry(tokenizer), text, fields, strict=False)
    ids = answer.generation.plan.prompts[0].ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "think <|begin|>Hi"
    assert [warning.split()[0] for warning in answer.shape.warnings] == [
        "chat_template_kwargs.bos_token",
        "chat_template_kwargs.other",
    ]
    with pytest.raises(ApiError, match=r"chat_template_kwargs\.bos_token"):
        await prepare_chat(registry(tokenizer), text, fields, strict=True)
