"""The official Python client, unchanged, against this server."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from inferneo_jax import OverloadedError, Tokenizer
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=rig.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [CHAT, EMBED]
    assert client.models.retrieve(CHAT).owned_by == "inferneo"


def test_chat_whole_streamed_and_by_the_helper(client: openai.OpenAI) -> None:
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
    chunks = list(
        client.chat.completions.create(
            model=CHAT, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    with client.chat.completions.stream(model=CHAT, messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == REPLY


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


def test_embeddings_of_ids_are_those_of_their_text(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the END")
    one, other = (client.embeddings.create(model=EMBED, input=v) for v in ("the END", ids))
    assert np.array_equal(one.data[0].embedding, other.data[0].embedding)
    short = client.embeddings.create(model=EMBED, input=[ids, ids], dimensions=2)
    assert [len(item.embedding) for item in short.data] == [2, 2]


def test_an_error_in_a_stream_reaches_the_caller(client: openai.OpenAI, rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 2, OverloadedError("out of pages")
    stream = client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="Out of pages"):
        list(stream)


def test_errors_are_the_clients_classes(client: openai.OpenAI, rig: Rig) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=CHAT, prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model=EMBED, input="")
    assert empty.value.param == "input"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/none")
    rig.engine.refusal = OverloadedError("4 requests are waiting already")
    with pytest.raises(openai.InternalServerError) as busy:
        client.chat.completions.create(model=CHAT, messages=MESSAGES)
    assert (busy.value.status_code, busy.value.code) == (503, "overloaded")


def test_raw_responses_hold_headers_and_the_parsed_answer(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=CHAT, messages=MESSAGES, extra_headers={"X-Request-Id": "mine"}
    )
    assert (raw.status_code, raw.headers["X-Request-Id"]) == (200, "mine")
    assert raw.parse().choices[0].message.content == REPLY
    models = client.models.with_raw_response.list()
    assert models.headers["Content-Type"] == "application/json"
    assert models.parse().data[0].id == CHAT


def test_streaming_responses_show_every_line(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=CHAT, messages=MESSAGES, stream=True
    ) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_our_own_parameters_go_through_extra_body(client: openai.OpenAI, rig: Rig) -> None:
    answer = client.completions.create(
        model=CHAT,
        prompt="Hi",
        max_tokens=50,
        logit_bias={"5": 3},
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    sampling = rig.engine.submitted[-1].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.1, 1.2)
    assert sampling.logit_bias == {5: 3.0}
    assert "warnings" not in (answer.model_extra or {})


def test_warnings_reach_who_looks_for_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=MESSAGES, store=True)
    assert answer.model_extra is not None
    assert "store" in answer.model_extra["warnings"][0]
    strict = client.with_options(default_headers={"X-Inferneo-Strict": "true"})
    with pytest.raises(openai.BadRequestError) as caught:
        strict.chat.completions.create(model=CHAT, messages=MESSAGES, extra_body={"beams": 2})
    assert caught.value.param == "beams"


async def test_many_async_streams_at_once(rig: Rig) -> None:
    async with openai.AsyncOpenAI(base_url=rig.url + "/v1", api_key="none") as client:

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model=CHAT, prompt=f"{number}", max_tokens=99, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert await asyncio.gather(*map(one, range(8))) == [REPLY] * 8
        vectors = await client.embeddings.create(model=EMBED, input="a")
        assert len(vectors.data[0].embedding) == 8
        stream = await client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == REPLY
        raw = await client.chat.completions.with_raw_response.create(model=CHAT, messages=MESSAGES)
        assert raw.parse().choices[0].message.content == REPLY
        assert [model.id async for model in client.models.list()] == [CHAT, EMBED]
