"""The whole server on the real models, over a real socket, in a process of its own."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websockets
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from tests.support.server_process import CHAT_MODEL, EMBEDDING_MODEL, stats_of
from tests.support.tiny_model import golden

pytestmark = pytest.mark.real

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CASES = golden("chat")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{address}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_sixteen_clients_stream_at_once_and_get_the_reference(address: str) -> None:
    async def one(api: AsyncOpenAI, case: dict[str, Any]) -> tuple[str, str | None]:
        stream = await api.completions.create(
            model=CHAT_MODEL,
            prompt=case["prompt_ids"],
            max_tokens=48,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
        text, reason = "", None
        async for chunk in stream:
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
        return text, reason

    async def everyone() -> list[tuple[str, str | None]]:
        async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="unused") as api:
            return await asyncio.gather(*(one(api, case) for case in CASES[:16]))

    answers = asyncio.run(everyone())
    assert len(answers) == 16
    for case, (text, reason) in zip(CASES, answers, strict=False):
        assert reason == "length"
        if min(case["margins"]) > 0.02:
            assert text == case["text"]


def test_chat_plain_streamed_and_over_websocket_agree(client: OpenAI, address: str) -> None:
    asked = {"model": CHAT_MODEL, "messages": QUESTION, "max_tokens": 20, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    assert "Paris" in (plain.choices[0].message.content or "")
    assert plain.choices[0].finish_reason == "stop"

    streamed = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == plain.choices[0].message.content

    async def over_websocket() -> str:
        parts = []
        async with websockets.connect(f"ws://{address}/v1/chat/completions") as ws:
            await ws.send(json.dumps(asked | {"stream": True}))
            while (frame := json.loads(await ws.recv()))["object"] != "done":
                parts.append(frame["choices"][0]["delta"].get("content") or "")
        return "".join(parts)

    assert asyncio.run(over_websocket()) == text


def test_seeded_choices_repeat_and_differ(client: OpenAI) -> None:
    asked = {"model": CHAT_MODEL, "messages": QUESTION, "max_tokens": 16, "n": 3, "seed": 5}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_echo_scores_equal_the_generations(client: OpenAI) -> None:
    made = client.completions.create(
        model=CHAT_MODEL, prompt="The sky is", max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    scores = made.choices[0].logprobs
    assert scores
    assert scores.tokens
    assert "".join(scores.tokens) == made.choices[0].text
    scored = client.completions.create(
        model=CHAT_MODEL, prompt=made.choices[0].text, max_tokens=0, logprobs=2, echo=True
    )
    again = scored.choices[0].logprobs
    assert again
    assert again.text_offset == scores.text_offset
    assert again.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:], abs=1e-3)


def test_a_second_turn_is_found_in_the_cache(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Count from one to twenty, in words, slowly. " * 4}]
    asked = {"model": CHAT_MODEL, "max_tokens": 24, "temperature": 0}
    first = client.chat.completions.create(messages=messages, **asked)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "Go on."})
    usage = client.chat.completions.create(messages=messages, **asked).usage
    assert usage
    assert usage.prompt_tokens_details
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 16 * 16


def test_embeddings_equal_the_reference(client: OpenAI) -> None:
    cases = [case for case in golden("embeddings") if case["text"]]
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=[case["text"] for case in cases])
    for case, item in zip(cases, answer.data, strict=True):
        assert item.embedding == pytest.approx(case["embedding"], abs=1e-4)
    assert answer.usage.prompt_tokens == sum(len(case["ids"]) for case in cases)


@pytest.mark.parametrize("how", ["sse", "plain", "websocket"])
def test_a_client_that_leaves_frees_its_slot_and_pages(address: str, how: str) -> None:
    body = {"model": CHAT_MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True}

    async def leave() -> None:
        if how == "websocket":
            async with websockets.connect(f"ws://{address}/v1/completions") as ws:
                await ws.send(json.dumps(body | {"stream": True}))
                await ws.recv()
        else:
            async with httpx.AsyncClient() as api:
                with pytest.raises(httpx.ReadTimeout):
                    await _read(api, body | {"stream": how == "sse"})

    async def _read(api: httpx.AsyncClient, payload: dict[str, Any]) -> None:
        url, timeout = f"http://{address}/v1/completions", httpx.Timeout(10, read=2.0)
        async with api.stream("POST", url, json=payload, timeout=timeout) as answer:
            async for _ in answer.aiter_raw():
                if stats_of(address)["slots_used"]:
                    raise httpx.ReadTimeout("seen enough")

    asyncio.run(leave())
    deadline = time.monotonic() + 5
    while (stats := stats_of(address))["slots_used"] or stats["pages_used"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)


def test_wrong_input_is_explained_and_the_server_goes_on(client: OpenAI, address: str) -> None:
    url = f"http://{address}/v1/completions"
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "x"}, "model"),
        ({"model": CHAT_MODEL}, "prompt"),
        ({"model": CHAT_MODEL, "prompt": "x", "temperature": "hot"}, "temperature"),
        ({"model": CHAT_MODEL, "prompt": "x", "temperature": 3}, "temperature"),
        ({"model": CHAT_MODEL, "prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"model": CHAT_MODEL, "prompt": [49152]}, "prompt"),
    ]
    for body, param in bodies:
        answer = httpx.post(url, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
    assert httpx.post(url, content=b"{", headers={"Content-Type": "application/json"}).is_error
    with pytest.raises(NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=CHAT_MODEL, prompt="word " * 9000)
    assert caught.value.code == "context_length_exceeded"
    assert client.completions.create(model=CHAT_MODEL, prompt="x", max_tokens=2).choices
