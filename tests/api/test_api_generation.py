"""What each parameter does, on both endpoints where both have it."""

from typing import Any

import pytest

from inferneo_jax import GenerationRequest, Tokenizer
from tests.support.asking import (
    CHATS,
    COMPLETIONS,
    HI,
    ask,
    frames,
    joined,
    prompt_text,
    refused,
    stream,
    whole_texts,
)
from tests.support.fake_engine import writes, writes_its_seed
from tests.support.fake_server import EMBED, REPLY, Rig

BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
STRICT = {"X-Inferneo-Strict": "true"}


def writes_the_prompt(rig: Rig, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    rig.engine.script = lambda request: [*request.prompt, eos]


@BOTH
def test_defaults_are_the_pages(rig: Rig, path: str) -> None:
    asked = {"max_tokens": None}
    ask(rig, path, **asked)
    spelled = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": None,
        "stream": False,
        "n": 1,
        "logit_bias": {},
        "user": None,
    }
    if path == COMPLETIONS:
        spelled |= {"max_tokens": 16, "best_of": 1, "echo": False, "logprobs": None, "suffix": None}
    ask(rig, path, **asked | spelled)
    absent, explicit = rig.engine.submitted
    for name in ("prompt", "max_tokens", "stop_token_ids", "min_tokens", "logprobs", "priority"):
        assert getattr(absent, name) == getattr(explicit, name)
    one, other = absent.sampling, explicit.sampling
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias"):
        assert getattr(one, name) == getattr(other, name)
    assert absent.max_tokens == (16 if path == COMPLETIONS else 512 - len(absent.prompt))
    assert (one.temperature, one.top_p, one.top_k, one.min_p) == (1, 1, 0, 0)
    assert (one.frequency_penalty, one.presence_penalty) == (0, 0)
    assert (one.repetition_penalty, one.logit_bias) == (1, {})
    assert (absent.logprobs, absent.prompt_logprobs, absent.priority) == (None, None, 0)


@BOTH
def test_values_at_their_bounds_are_served(rig: Rig, path: str) -> None:
    for bounds in (
        {"temperature": 0, "top_p": 1, "top_k": 0, "frequency_penalty": -2, "presence_penalty": -2},
        {"temperature": 2, "top_p": 1e-9, "min_p": 1, "frequency_penalty": 2},
        {"presence_penalty": 2, "logit_bias": {"0": -100, "1": 100}, "stop": ["x"] * 16},
        {"seed": 2**64 - 1, "priority": -(2**31), "n": 1, "repetition_penalty": 10},
    ):
        assert "warnings" not in ask(rig, path, **bounds)


@BOTH
def test_a_seed_decides_the_sampling_of_each_choice(
    rig: Rig, tokenizer: Tokenizer, path: str
) -> None:
    rig.engine.script = writes_its_seed(tokenizer)
    wanted = {0: "seed 7", 1: "seed 8"}
    assert whole_texts(ask(rig, path, n=2, seed=7)) == wanted
    assert joined(stream(rig, path, n=2, seed=7)) == wanted
    assert joined(frames(rig, path, n=2, seed=7)) == wanted


@pytest.mark.parametrize("as_ids", [False, True])
def test_prompts_times_n_come_in_prompt_order(rig: Rig, tokenizer: Tokenizer, as_ids: bool) -> None:
    writes_the_prompt(rig, tokenizer)
    texts = ["one", "the two", "caf\u00e9"]
    prompts: list[Any] = [tokenizer.encode(text) for text in texts] if as_ids else texts
    wanted = dict(enumerate(text for text in texts for _ in range(3)))
    answer = ask(rig, COMPLETIONS, prompt=prompts, n=3)
    assert [choice["index"] for choice in answer["choices"]] == list(range(9))
    assert whole_texts(answer) == wanted
    assert joined(stream(rig, COMPLETIONS, prompt=prompts, n=3)) == wanted
    prompt_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 3 * (prompt_tokens + len(texts))


def test_best_of_picks_within_each_prompt_and_counts_all(rig: Rig, tokenizer: Tokenizer) -> None:
    # The default, spelled out, asks for nothing that a stream cannot give.
    assert joined(stream(rig, COMPLETIONS, best_of=1)) == {0: REPLY}
    (eos,) = tokenizer.eos_token_ids

    def script(request: GenerationRequest) -> list[int]:
        # The likelier of the three differs by prompt; a token's score falls with its id modulo 7.
        number = request.sampling.seed % 3
        order = [15, 14, 16] if request.prompt == (0,) else [16, 15, 14]
        return [order[number], eos]

    rig.engine.script = script
    answer = ask(rig, COMPLETIONS, prompt=[[0], [1]], best_of=3, n=1, seed=0)
    assert whole_texts(answer) == dict.fromkeys((0, 1), tokenizer.decode([14]))
    assert answer["usage"]["completion_tokens"] == 2 * 3 * 2
    both = ask(rig, COMPLETIONS, prompt=[[0], [1]], best_of=3, n=2, seed=0)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in both["choices"])
    assert list(whole_texts(both).values()) == [tokenizer.decode([i]) for i in (14, 15) * 2]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_echo_begins_every_choice_streamed_or_not(
    rig: Rig, tokenizer: Tokenizer, as_ids: bool, logprobs: int | None
) -> None:
    texts = ["the END", "caf\u00e9"]
    prompts: list[Any] = [tokenizer.encode(text) for text in texts] if as_ids else texts
    asked = {"prompt": prompts, "n": 2, "echo": True, "logprobs": logprobs, "stop": "END"}
    wanted = dict(enumerate(t + REPLY[: REPLY.index("END")] for t in texts for _ in range(2)))
    answer = ask(rig, COMPLETIONS, **asked)
    assert whole_texts(answer) == wanted  # a stop in the prompt stops nothing
    assert joined(stream(rig, COMPLETIONS, **asked)) == wanted
    for choice in answer["choices"]:
        if logprobs is None:
            assert choice["logprobs"] is None
        else:
            assert choice["logprobs"]["token_logprobs"].count(None) == 1
            assert choice["logprobs"]["token_logprobs"][0] is None


def test_no_tokens_with_echo_only_scores(rig: Rig) -> None:
    asked = {"prompt": ["the", "END of"], "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = ask(rig, COMPLETIONS, **asked)
    assert whole_texts(answer) == {0: "the", 1: "END of"}
    assert answer["usage"]["completion_tokens"] == 0
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert answer["choices"][1]["logprobs"]["tokens"] == ["END", " ", "o", "f"]
    chunks = stream(rig, COMPLETIONS, **asked)
    assert joined(chunks) == {0: "the", 1: "END of"}
    scores = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert scores == [choice["logprobs"] for choice in answer["choices"]]
    assert refused(rig, COMPLETIONS, max_tokens=0)["param"] == "max_tokens"
    assert refused(rig, CHATS, max_tokens=0)["param"] == "max_tokens"


@BOTH
def test_the_newer_name_of_max_tokens_goes_first(rig: Rig, path: str) -> None:
    answer = ask(rig, path, max_tokens=5, max_completion_tokens=6)
    assert rig.engine.submitted[-1].max_tokens == 6
    assert len(answer["warnings"]) == 1
    assert answer["warnings"][0].startswith("max_tokens, 5, has no effect")
    assert "warnings" not in ask(rig, path, max_tokens=6, max_completion_tokens=6)
    assert refused(rig, path, max_completion_tokens=3, min_tokens=4)["param"] == "min_tokens"


@BOTH
def test_stops_and_stop_tokens_may_stay_in_the_text(
    rig: Rig, tokenizer: Tokenizer, path: str
) -> None:
    (word,) = tokenizer.encode("END")
    before = REPLY[: REPLY.index("END")]
    for asked in ({"stop": "END"}, {"stop": ["END of it", "END"]}, {"stop_token_ids": [word]}):
        for include in (False, True):
            changes: dict[str, Any] = asked | {"include_stop_str_in_output": include}
            wanted = {0: before + "END" * include}
            assert whole_texts(ask(rig, path, **changes)) == wanted
            assert joined(stream(rig, path, **changes)) == wanted
            chunks = stream(rig, path, **changes)
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@BOTH
def test_ignore_eos_and_min_tokens_reach_the_engine(
    rig: Rig, tokenizer: Tokenizer, path: str
) -> None:
    rig.engine.script = writes(tokenizer, "ab", end=False)
    asked = {"ignore_eos": True, "stop_token_ids": [9], "min_tokens": 3, "max_tokens": 4}
    answer = ask(rig, path, **asked)
    assert whole_texts(answer) == {0: "abab"}
    assert answer["choices"][0]["finish_reason"] == "length"
    request = rig.engine.submitted[-1]
    assert (request.stop_token_ids, request.min_tokens) == ({9}, 3)


@BOTH
def test_what_has_no_effect_here_is_said(rig: Rig, path: str) -> None:
    asked: dict[str, Any] = {"metadata": {"a": "b"}, "store": True, "service_tier": "flex"}
    said = ask(rig, path, user="someone", **asked)["warnings"]
    assert [warning.split()[0] for warning in said] == list(asked)
    assert all("no effect" in warning for warning in said)
    assert stream(rig, path, **asked)[0]["warnings"] == said
    assert frames(rig, path, **asked)[0]["warnings"] == said
    # They are known, so strictness does not refuse them.
    assert ask(rig, path, STRICT, **asked)["warnings"] == said
    assert "warnings" not in ask(rig, path, metadata={}, store=False, service_tier="auto")


@BOTH
def test_unknown_names_are_said_or_refused(rig: Rig, path: str) -> None:
    asked: dict[str, Any] = {"functions": [], "beam_width": 2, "stream": False}
    said = ask(rig, path, **asked)["warnings"]
    assert [warning.split()[0] for warning in said] == ["beam_width", "functions"]
    assert refused(rig, path, STRICT, **asked)["param"] == "beam_width"
    assert "warnings" not in ask(rig, path, STRICT)
    assert ask(rig, path, beam_width=None, Temperature=2)["warnings"][0].startswith("Temperature ")
    (told, *rest) = stream(rig, path, stream_options={"include_obfuscation": False})
    assert told["warnings"][0].startswith("stream_options.include_obfuscation ")
    assert all("warnings" not in chunk for chunk in rest)
    nested = {"stream": True, "stream_options": {"include_usage": True, "extra": 1}}
    assert refused(rig, path, STRICT, **nested)["param"] == "stream_options.extra"


def test_embeddings_are_strict_too(rig: Rig) -> None:
    body = {"model": EMBED, "input": "Hi", "pooling": "cls"}
    assert rig.post("/v1/embeddings", body).json()["warnings"][0].startswith("pooling ")
    response = rig.post("/v1/embeddings", body, headers=STRICT)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "pooling")


@BOTH
def test_an_alias_is_the_model_of_every_chunk(rig: Rig, path: str) -> None:
    assert ask(rig, path, model="gpt-4o")["model"] == "gpt-4o"
    assert {chunk["model"] for chunk in stream(rig, path, model="gpt-4o")} == {"gpt-4o"}
    assert {frame["model"] for frame in frames(rig, path, model="gpt-4o")} == {"gpt-4o"}


def test_only_variables_that_the_template_reads_reach_it(tokenizer: Tokenizer, rig: Rig) -> None:
    # The template here reads none; tests/text has one that does.
    for name in ("enable_thinking", "bos_token", "range"):
        said = ask(rig, CHATS, chat_template_kwargs={name: True})["warnings"]
        assert [warning.split()[0] for warning in said] == [f"chat_template_kwargs.{name}"]
        error = refused(rig, CHATS, STRICT, chat_template_kwargs={name: True})
        assert error["param"] == f"chat_template_kwargs.{name}"
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        error = refused(rig, CHATS, chat_template_kwargs={name: True})
        assert error["param"] == "chat_template_kwargs"
    assert len({request.prompt for request in rig.engine.submitted}) == 1


def test_the_last_message_may_be_continued(rig: Rig, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Well"}, {"type": "text", "text": "then,"}]
    for content in ("Well\nthen,", parts):
        messages = [*HI, {"role": "assistant", "content": content}]
        asked = {"messages": messages, "continue_final_message": True}
        assert whole_texts(ask(rig, CHATS, **asked)) == {0: REPLY}
        assert prompt_text(rig, tokenizer).endswith("<|start|>assistant\nWell\nthen,")
        ask(rig, CHATS, **asked, add_generation_prompt=False)
        assert prompt_text(rig, tokenizer).endswith("Well\nthen,")
    assert joined(stream(rig, CHATS, **asked)) == {0: REPLY}


def test_what_the_assistant_said_can_be_sent_back_whole(rig: Rig) -> None:
    message = ask(rig, CHATS)["choices"][0]["message"]
    again = ask(rig, CHATS, messages=[*HI, message, *HI])
    assert whole_texts(again) == {0: REPLY}
    assert "warnings" not in again
