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
