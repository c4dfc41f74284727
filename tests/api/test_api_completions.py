"""``POST /v1/completions``, plain and streamed."""

from typing import Any

import pytest

from inferneo_jax import Tokenizer
from tests.support.asking import COMPLETIONS, ask, joined, stream
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, REPLY, Rig


def merged_logprobs(events: list[Any], index: int = 0) -> dict[str, list[Any]]:
    merged: dict[str, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    merged.setdefault(name, []).extend(values)
    return merged


def test_answer_has_the_shape_of_the_page(rig: Rig) -> None:
    got = ask(rig, COMPLETIONS)
    assert got.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert got["id"].startswith("cmpl-")
    assert (got["object"], got["model"]) == ("text_completion", CHAT)
    assert got["choices"] == [
        {"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}
    ]
    sampled = len(rig.engine.script(rig.engine.submitted[0]))
    assert got["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": sampled,
        "total_tokens": 2 + sampled,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_every_sampling_parameter_reaches_the_engine(rig: Rig, tokenizer: Tokenizer) -> None:
    ask(
        rig,
        COMPLETIONS,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        frequency_penalty=0.3,
        presence_penalty=-0.4,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 2.5},
        seed=-1,
        min_tokens=3,
        stop_token_ids=[9],
        priority=-2,
        cache_salt="tenant",
    )
    request = rig.engine.submitted[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.3, -0.4)
    assert sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert sampling.seed == 2**64 - 1
    assert request.stop_token_ids == {9} | tokenizer.eos_token_ids
    assert (request.min_tokens, request.priority, request.cache_salt) == (3, -2, b":tenant")


def test_a_stop_string_ends_the_request_in_the_engine(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "one END two ", end=False)
    rig.engine.limit = 20  # beyond the stop, and short of max_tokens
    got = ask(rig, COMPLETIONS, stop="END", max_tokens=400)
    assert got["choices"][0]["text"] == "one "
    assert got["usage"]["completion_tokens"] == len("one ") + 1
    rig.engine.wait_until(lambda e: e.aborted == [f"{got['id']}-0"])


def test_before_min_tokens_a_stop_string_is_text(rig: Rig) -> None:
    first = REPLY.index("a")
    assert ask(rig, COMPLETIONS, stop="a")["choices"][0]["text"] == REPLY[:first]
    got = ask(rig, COMPLETIONS, stop="a", min_tokens=first + 1)["choices"][0]["text"]
    assert got == REPLY[: REPLY.index("a", first + 1)]


def test_a_stop_token_is_no_part_of_the_text(rig: Rig, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("END")
    got = ask(rig, COMPLETIONS, stop_token_ids=[token], logprobs=0)["choices"][0]
    assert got["text"] == REPLY[: REPLY.index("END")]
    assert "END" not in got["logprobs"]["tokens"]


def test_special_tokens_show_only_when_asked_for(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "a<|start|>b")
    assert ask(rig, COMPLETIONS)["choices"][0]["text"] == "ab"
    assert ask(rig, COMPLETIONS, skip_special_tokens=False)["choices"][0]["text"] == "a<|start|>b"


def test_logprobs_name_every_token_at_its_offset(rig: Rig) -> None:
    got = ask(rig, COMPLETIONS, logprobs=2)["choices"][0]
    logprobs = got["logprobs"]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(values) for values in logprobs.values()}) == 1
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert got["text"].startswith(token, offset)
    e_acute = logprobs["tokens"].index(r"bytes:\xc3")
    assert logprobs["tokens"][e_acute + 1] == r"bytes:\xa9"
    assert logprobs["text_offset"][e_acute] == logprobs["text_offset"][e_acute + 1] == 3
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == value
        assert 2 <= len(top) <= 3


@pytest.mark.parametrize("stop", [None, "ve", "\u00ef", "END"])
@pytest.mark.parametrize("batch", [1, 5])
def test_logprobs_are_the_same_streamed_and_not(rig: Rig, stop: str | None, batch: int) -> None:
    plain = ask(rig, COMPLETIONS, logprobs=1, stop=stop, echo=True)["choices"][0]
    rig.engine.batch = batch
    events = stream(rig, COMPLETIONS, logprobs=1, stop=stop, echo=True)
    assert merged_logprobs(events) == plain["logprobs"]
    assert joined(events)[0] == plain["text"]


def test_echo_prefixes_the_prompt_and_scores_it(rig: Rig) -> None:
    got = ask(rig, COMPLETIONS, prompt="h\u00e9 the", echo=True, logprobs=1)["choices"][0]
    assert got["text"] == "h\u00e9 the" + REPLY
    logprobs = got["logprobs"]
    assert logprobs["tokens"][:5] == ["h", r"bytes:\xc3", r"bytes:\xa9", " ", "the"]
    assert logprobs["text_offset"][:6] == [0, 1, 1, 2, 3, 6]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value is not None for value in logprobs["token_logprobs"][1:])


def test_prompts_of_every_form_give_the_same_ids(rig: Rig, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the")
    for prompt in ("the", ["the"], ids, [ids]):
        ask(rig, COMPLETIONS, prompt=prompt)
    assert {request.prompt for request in rig.engine.submitted} == {tuple(ids)}


def test_an_empty_prompt_begins_with_the_first_token(rig: Rig, tokenizer: Tokenizer) -> None:
    assert ask(rig, COMPLETIONS, prompt="", echo=True)["choices"][0]["text"] == REPLY
    assert rig.engine.submitted[0].prompt == (tokenizer.bos_token_id,)


def test_without_a_seed_no_two_requests_share_one(rig: Rig) -> None:
    ask(rig, COMPLETIONS)
    ask(rig, COMPLETIONS)
    first, second = rig.engine.submitted
    assert first.sampling.seed != second.sampling.seed


def test_suffix_is_appended_with_a_warning(rig: Rig) -> None:
    got = ask(rig, COMPLETIONS, suffix=" ever after")
    assert got["choices"][0]["text"] == REPLY + " ever after"
    assert "suffix" in got["warnings"][0]
    events = stream(rig, COMPLETIONS, suffix=" ever after")
    assert joined(events)[0] == REPLY + " ever after"
    assert events[0]["warnings"] == got["warnings"]
    assert all("warnings" not in event for event in events[1:])


def test_null_counts_as_absent(rig: Rig) -> None:
    nulls = dict.fromkeys(["stop", "temperature", "n", "logprobs", "suffix", "seed", "echo"])
    assert ask(rig, COMPLETIONS, **nulls)["choices"][0]["text"] == REPLY
