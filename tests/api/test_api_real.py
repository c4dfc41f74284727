"""The whole server on the real models, over a real socket, in a process of its own."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from openai import AsyncOpenAI, OpenAI

from inferneo_jax import Tokenizer
from tests.support.asking import joined, whole_texts
from tests.support.raw_http import parse_stream
from tests.support.server_process import CHAT_MODEL
from tests.support.tiny_model import golden

pytestmark = pytest.mark.real

ASK = [{"role": "user", "content": "What is the capital of France?"}]
HARD = [
    "Repeat after me: \U0001f600\U0001f680 caf\u00e9 na\u00efve",
    "Translate to Chinese: hello world \u4f60\u597d",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u5143\u6c17\u3067\u3059\u304b",
    "e\u0301 a\u0308 o\u0302 are written with combining marks, as are",
    "\u0928\u092e\u0938\u094d\u0924\u0947 means",
    "\U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467",
]


CASES = golden("chat")


@pytest.fixture(scope="module")
def api(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{address}/v1", timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def real_tokenizer(real_checkpoints: Path) -> Tokenizer:
    return Tokenizer.from_directory(real_checkpoints / CHAT_MODEL)


def complete(api: httpx.Client, **fields: Any) -> Any:
    body = {"model": CHAT_MODEL, "prompt": "The sky is", "temperature": 0, "max_tokens": 8}
    response = api.post("/completions", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def chat(api: httpx.Client, **fields: Any) -> Any:
    body = {"model": CHAT_MODEL, "messages": ASK, "temperature": 0, "max_tokens": 12}
    response = api.post("/chat/completions", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts_of(answer: Any) -> list[str]:
    return [*whole_texts(answer).values()]


def streamed(api: httpx.Client, **fields: Any) -> list[Any]:
    body = {"model": CHAT_MODEL, "temperature": 0, "max_tokens": 8, "stream": True}
    response = api.post("/completions", json=body | fields)
    return parse_stream(response.text)


def test_created_is_the_checkpoints_whatever_the_process(
    api: httpx.Client, real_checkpoints: Path
) -> None:
    for card in api.get("/models").json()["data"]:
        manifest = json.loads((real_checkpoints / card["id"] / "inferneo.json").read_text())
        assert card["created"] == manifest["created"]
        assert api.get(f"/models/{card['id']}").json()["created"] == card["created"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("prompt", HARD)
def test_streamed_text_joined_is_the_plain_text(api: httpx.Client, prompt: str, seed: int) -> None:
    # Sampled hot, so that rare characters and their halves come up; the seeds repeat it. One at a
    # time and from no cached pages, so that both are computed in the same order.
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 16, "seed": seed}
    asked |= {"temperature": 1.8, "logprobs": 0, "ignore_eos": True}
    (choice,) = complete(api, **asked, cache_salt="plain")["choices"]
    chunks = streamed(api, **asked, cache_salt="streamed")
    assert joined(chunks)[0] == choice["text"]
    merged: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["logprobs"]:
                for name, values in merged.items():
                    values += part["logprobs"][name]
    assert merged["tokens"] == choice["logprobs"]["tokens"]
    assert merged["text_offset"] == choice["logprobs"]["text_offset"]
    wanted = choice["logprobs"]["token_logprobs"]
    assert merged["token_logprobs"] == pytest.approx(wanted, abs=1e-3)


def test_stops_cut_a_generation_where_they_first_complete(api: httpx.Client) -> None:
    whole = texts_of(complete(api, max_tokens=16))[0]
    for start in range(1, len(whole) - 3, 14):
        stop = whole[start : start + 3]
        cut = complete(api, max_tokens=16, stop=stop)["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        assert (
            joined(streamed(api, prompt="The sky is", max_tokens=16, stop=stop))[0] == cut["text"]
        )


def test_echo_scores_what_the_generation_scored(api: httpx.Client) -> None:
    for prompt in ("The sky is", *HARD[:3]):
        made = complete(api, prompt=prompt, logprobs=3, echo=True)["choices"][0]
        scores = made["logprobs"]
        assert scores["token_logprobs"][0] is None
        assert all(value <= 0 for value in scores["token_logprobs"][1:])
        if not any(token.startswith("bytes:") for token in scores["tokens"]):
            assert "".join(scores["tokens"]) == made["text"]
        if "\ufffd" in made["text"]:
            continue  # ends within a character, which a text cannot give back
        again = complete(api, prompt=made["text"], logprobs=3, echo=True, max_tokens=0)
        assert again["usage"]["completion_tokens"] == 0
        rescored = again["choices"][0]["logprobs"]
        if rescored["tokens"] == scores["tokens"]:  # else the text is spelled in other tokens
            assert rescored["text_offset"] == scores["text_offset"]
            wanted = scores["token_logprobs"][1:]
            assert rescored["token_logprobs"][1:] == pytest.approx(wanted, abs=2e-3)


def test_prompts_of_ids_equal_prompts_of_text(api: httpx.Client, real_tokenizer: Tokenizer) -> None:
    prompts = ["The sky is", "One, two, three,", "caf\u00e9 \U0001f600"]
    ids = [real_tokenizer.encode(prompt) for prompt in prompts]
    one, other = complete(api, prompt=prompts), complete(api, prompt=ids)
    assert texts_of(one) == texts_of(other)
    assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    assert texts_of(one) == [texts_of(complete(api, prompt=prompt))[0] for prompt in prompts]


def test_logit_bias_forbids_and_forces(api: httpx.Client, real_tokenizer: Tokenizer) -> None:
    first = complete(api, max_tokens=1, logprobs=0)["choices"][0]
    (token,) = first["logprobs"]["tokens"]
    (banned,) = real_tokenizer.encode(token)
    other = complete(api, max_tokens=1, logit_bias={str(banned): -100})["choices"][0]
    assert other["text"] != first["text"]
    forced = complete(api, max_tokens=3, logit_bias={str(banned): 100})["choices"][0]
    assert forced["text"] == token * 3


def test_min_tokens_keeps_the_end_away(api: httpx.Client) -> None:
    short = chat(api, max_tokens=40)
    sampled = short["usage"]["completion_tokens"]
    assert short["choices"][0]["finish_reason"] == "stop"
    longer = chat(api, max_tokens=40, min_tokens=sampled + 5)
    assert longer["usage"]["completion_tokens"] >= sampled + 5
    endless = chat(api, max_tokens=40, ignore_eos=True)
    assert endless["usage"]["completion_tokens"] == 40
    assert endless["choices"][0]["finish_reason"] == "length"


def test_penalties_make_repetition_dearer(api: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": "one two " * 8, "max_tokens": 12}
    plain = texts_of(complete(api, **asked))[0].split()
    assert len(set(plain)) < len(plain)
    for penalty in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2}):
        got = texts_of(complete(api, **asked, **penalty))[0].split()
        assert len(got) - len(set(got)) < len(plain) - len(set(plain))


def test_the_smallest_nuclei_are_greedy(api: httpx.Client) -> None:
    greedy = texts_of(complete(api))
    for nucleus in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert texts_of(complete(api, temperature=1.5, **nucleus)) == greedy


def test_best_of_returns_the_likeliest_of_what_n_samples(api: httpx.Client) -> None:
    asked = {"temperature": 1.3, "seed": 9, "logprobs": 0, "ignore_eos": True}
    every = complete(api, **asked, n=4)
    best = complete(api, **asked, n=2, best_of=4)

    def mean(choice: Any) -> float:
        return float(sum(choice["logprobs"]["token_logprobs"]))

    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert texts_of(best) == [choice["text"] for choice in ranked[:2]]
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"] == 32


def test_chat_log_probabilities_are_the_completions(api: httpx.Client) -> None:
    answer = chat(api, logprobs=True, top_logprobs=2)["choices"][0]
    content = answer["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in content).decode() == answer["message"]["content"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        # Greedy: the token is the likeliest.
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])


def test_a_message_can_be_continued(api: httpx.Client) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The capital of France is"}]
    answer = chat(api, messages=begun, continue_final_message=True, max_tokens=3)
    assert answer["choices"][0]["message"]["content"].startswith(" Paris")


def test_a_developer_is_the_system_to_a_template_that_knows_no_other(api: httpx.Client) -> None:
    def told(role: str) -> Any:
        return chat(api, messages=[{"role": role, "content": "Answer in French."}, *ASK])

    one, other = told("developer"), told("system")
    assert one["choices"][0]["message"] == other["choices"][0]["message"]
    assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


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
    asked = {"model": CHAT_MODEL, "messages": ASK, "max_tokens": 20, "temperature": 0}
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
