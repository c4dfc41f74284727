"""``POST /v1/chat/completions``, plain and streamed."""

import threading
from typing import Any

import pytest

from inferneo_jax import Tokenizer
from tests.support.asking import CHATS, ask, prompt_text, refused, stream
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, REPLY, Rig


def test_answer_has_the_shape_of_the_page(rig: Rig) -> None:
    got = ask(rig, CHATS)
    assert got["id"].startswith("chatcmpl-")
    assert (got["object"], got["model"]) == ("chat.completion", CHAT)
    message = {"role": "assistant", "content": REPLY, "refusal": None}
    assert got["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    ]


def test_the_template_writes_the_prompt(rig: Rig, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    ask(rig, CHATS, messages=messages)
    assert prompt_text(rig, tokenizer) == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\na\nb<|end|>\n<|start|>assistant\n"
    )
    ask(rig, CHATS, add_generation_prompt=True)
    assert prompt_text(rig, tokenizer).endswith("<|start|>assistant\n")
    ask(rig, CHATS, add_generation_prompt=False)
    assert prompt_text(rig, tokenizer) == "<|start|>user\nHi<|end|>\n"


def test_a_conversation_is_always_read_on_a_thread(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    encode = Tokenizer.encode

    def spy(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    ask(rig, CHATS)
    rig.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    (rendering,) = {name.partition("_")[0] for name in threads}
    assert (rendering, len(threads)) == ("text", 2)


def test_logprobs_are_openais_and_the_same_streamed(rig: Rig) -> None:
    content = ask(rig, CHATS, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == REPLY
    for token in content:
        assert token.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert [top.keys() for top in token["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    events = stream(rig, CHATS, logprobs=True, top_logprobs=2)
    streamed = [e["choices"][0]["logprobs"] for e in events]
    assert [token for part in streamed if part for token in part["content"]] == content
    plain = ask(rig, CHATS, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in plain)


def test_length_ends_it(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "\u00e9", end=False)
    got = ask(rig, CHATS, max_tokens=3)["choices"][0]
    # The fourth byte never came: what is open at the end shows as U+FFFD, streamed and not.
    assert got["message"]["content"] == "\u00e9\ufffd"
    assert got["finish_reason"] == "length"
    events = stream(rig, CHATS, max_tokens=3)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "\u00e9\ufffd"


def test_what_the_template_does_not_read_is_said(rig: Rig) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    options: dict[str, Any] = {"enable_thinking": True, "reasoning_effort": "low", "tools": [tool]}
    warnings = ask(rig, CHATS, **options)["warnings"]
    assert [warning.split()[0].strip(":") for warning in warnings] == [*options, "tools"]
    strict = {"X-Inferneo-Strict": "true"}
    for field, value in options.items():
        assert refused(rig, CHATS, headers=strict, **{field: value})["param"] == field
