"""Text laws with the real tokenizer: the engine writes chosen token ids, the rest is the server."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferneo_jax import GenerationOutput, GenerationRequest, Tokenizer
from server.prompt.prompts import Prompt
from server.run.output import OutputProcessor, TextOptions, TextPart
from tests.support.asking import CHATS, COMPLETIONS, ask, joined, stream, whole_texts
from tests.support.fake_engine import logprob_of
from tests.support.fake_server import Rig, running
from tests.support.server_process import CHAT_MODEL

pytestmark = pytest.mark.real

PIECES = (
    "plain words",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4",
    "e\u0301a\u0308o\u0302 na\u00efve",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "  two  spaces\n\nand\tlines\r\n",
    "\U0001f1eb\U0001f1f7\u2764\ufe0f \U00020000",
    "def f(x):\n    return x ** 2  # \u00b2",
)
TEXTS = [
    first + joint + second for first, second in itertools.product(PIECES, PIECES) for joint in [" "]
]
"""A hundred texts: each piece next to each."""


@pytest.fixture(scope="module")
def real_tokenizer(real_checkpoints: Path) -> Tokenizer:
    return Tokenizer.from_directory(real_checkpoints / CHAT_MODEL)


@pytest.fixture(scope="module")
def spelled(real_tokenizer: Tokenizer) -> list[list[int]]:
    return [real_tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


@pytest.fixture(scope="module")
def real_rig(real_tokenizer: Tokenizer) -> Iterator[Rig]:
    with running(real_tokenizer) as rig:
        yield rig


def writes_number(rig: Rig, tokenizer: Tokenizer, spelled: list[list[int]]) -> None:
    """The engine writes the text whose number is the request's seed."""
    (eos,) = sorted(tokenizer.eos_token_ids)[:1]

    def script(request: GenerationRequest) -> list[int]:
        return [*spelled[request.sampling.seed], eos]

    rig.engine.script = script


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_hundred_texts_streamed_are_the_plain_ones(
    real_rig: Rig, real_tokenizer: Tokenizer, spelled: list[list[int]], path: str, batch: int
) -> None:
    writes_number(real_rig, real_tokenizer, spelled)
    real_rig.engine.batch = batch
    for start in range(0, len(TEXTS), 20):
        # OutputProcessor i has the seed i above the first.
        wanted = dict(enumerate(TEXTS[start : start + 20]))
        assert whole_texts(ask(real_rig, path, seed=start, n=20)) == wanted
        assert joined(stream(real_rig, path, seed=start, n=20)) == wanted


def events_of(
    tokenizer: Tokenizer, ids: list[int], size: int, options: TextOptions
) -> list[TextPart]:
    choice = OutputProcessor(0, tokenizer, Prompt(ids=(1,), max_tokens=len(ids)), options)
    events: list[TextPart] = []
    for start in range(0, len(ids), size):
        piece = tuple(ids[start : start + size])
        choice.feed(
            GenerationOutput(
                token_ids=piece,
                logprobs=tuple(logprob_of(token, 0) for token in piece),
                finish_reason="length" if start + size >= len(ids) else None,
            )
        )
        if event := choice.take():
            events.append(event)
        if choice.finish_reason is not None:
            break
    return events


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_every_stop_at_every_offset_of_every_text(
    real_tokenizer: Tokenizer, spelled: list[list[int]], length: int, include: bool
) -> None:
    for text, ids in zip(TEXTS, spelled, strict=True):
        for start in range(len(text) - length + 1):
            stop = text[start : start + length]
            options = TextOptions(stops=(stop,), include_stop=include, logprobs=True)
            end = text.index(stop) + (length if include else 0)
            for size in (1, 5):
                events = events_of(real_tokenizer, ids, size, options)
                assert "".join(event.text for event in events) == text[:end]
                assert events[-1].finish_reason == "stop"
                tokens = [token for event in events for token in event.tokens]
                assert all(token.offset < max(1, end) for token in tokens)


def test_no_text_holds_back_more_than_a_stop_could_need(
    real_tokenizer: Tokenizer, spelled: list[list[int]]
) -> None:
    for text, ids in zip(TEXTS, spelled, strict=True):
        shown = ""
        for event in events_of(real_tokenizer, ids, 1, TextOptions(stops=("\x00\x01",))):
            assert "\ufffd" not in event.text
            shown += event.text
        assert shown == text


def test_offsets_count_characters_streamed_or_not(
    real_rig: Rig, real_tokenizer: Tokenizer, spelled: list[list[int]]
) -> None:
    writes_number(real_rig, real_tokenizer, spelled)
    for batch in (1, 4):
        real_rig.engine.batch = batch
        for number in range(0, len(TEXTS), 7):
            text = TEXTS[number]
            asked: dict[str, Any] = {"seed": number, "logprobs": 0, "echo": True, "prompt": text}
            (plain,) = ask(real_rig, COMPLETIONS, **asked)["choices"]
            scores = plain["logprobs"]
            assert plain["text"] == text + text
            assert len(scores["tokens"]) == 2 * len(spelled[number])
            assert sorted(scores["text_offset"]) == scores["text_offset"]
            for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
                if not token.startswith("bytes:"):
                    assert plain["text"].startswith(token, offset)
            merged: dict[str, list[Any]] = {name: [] for name in scores}
            for chunk in stream(real_rig, COMPLETIONS, **asked):
                for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
                    merged[name] += values
            assert merged == scores
