"""The ``openai`` Python client, unchanged, against this server."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from inferneo_jax import OverloadedError
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=rig.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [CHAT, EMBED]
    assert client.models.retrieve(CHAT).owned_by == "inferneo"


def test_chat(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model=CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1
    )
    assert got.choices[0].message.content == REPLY
    assert got.choices[0].finish_reason == "stop"
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens > 0
    assert got.choices[0].logprobs is not None
    assert len(got.choices[0].logprobs.content or ()) > 0


def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices


def test_the_stream_helper_builds_the_whole_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=CHAT, messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == REPLY


def test_completions(client: openai.OpenAI) -> None:
    got = client.completions.create(model=CHAT, prompt=["a", "b"], max_tokens=99, logprobs=2)
    assert [choice.text for choice in got.choices] == [REPLY, REPLY]
    stream = client.completions.create(model=CHAT, prompt="a", max_tokens=99, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == REPLY


def test_embeddings_come_as_floats_though_sent_as_base64(client: openai.OpenAI) -> None:
    got = client.embeddings.create(model=EMBED, input=["a", "b"])
    plain = client.embeddings.create(model=EMBED, input=["a", "b"], encoding_format="float")
    coded: Any = client.embeddings.create(model=EMBED, input="a", encoding_format="base64")
    assert [d.embedding for d in got.data] == [pytest.approx(d.embedding) for d in plain.data]
    raw = np.frombuffer(base64.b64decode(coded.data[0].embedding), "<f4")
    assert raw == pytest.approx(plain.data[0].embedding)


async def test_async_client(rig: Rig) -> None:
    async with openai.AsyncOpenAI(base_url=rig.url + "/v1", api_key="none") as client:
        got = await client.chat.completions.create(model=CHAT, messages=MESSAGES)
        assert got.choices[0].message.content == REPLY
        stream = await client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert text == REPLY
        vectors = await client.embeddings.create(model=EMBED, input="a")
        assert len(vectors.data[0].embedding) == 8


def test_errors_are_the_clients_classes(client: openai.OpenAI, rig: Rig) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    rig.engine.refusal = OverloadedError("4 requests are waiting already")
    with pytest.raises(openai.InternalServerError) as busy:
        client.chat.completions.create(model=CHAT, messages=MESSAGES)
    assert (busy.value.status_code, busy.value.code) == (503, "overloaded")


def test_an_error_in_a_stream_reaches_the_caller(client: openai.OpenAI, rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 2, OverloadedError("out of pages")
    stream = client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="Out of pages"):
        list(stream)
