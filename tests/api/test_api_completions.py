"""``POST /v1/completions``, plain and streamed."""

from typing import Any

import pytest

from inferneo_jax import GenerationRequest, Tokenizer
from tests.support.fake_engine import writes, writes_its_seed
from tests.support.fake_server import CHAT, REPLY, Rig

PATH = "/v1/completions"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": CHAT, "prompt": "Hi", "max_tokens": 100, **changes}


def answer(rig: Rig, **changes: Any) -> Any:
    response = rig.post(PATH, body(**changes))
    assert response.status_code == 200, response.text
    return response.json()


def texts(events: list[Any]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def merged_logprobs(events: list[Any], index: int = 0) -> dict[str, list[Any]]:
    merged: dict[str, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    merged.setdefault(name, []).extend(values)
    return merged


def test_answer_has_the_shape_of_the_page(rig: Rig) -> None:
    got = answer(rig)
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
    }


def test_defaults_reach_the_engine(rig: Rig) -> None:
    answer(rig, max_tokens=None)
    request = rig.engine.submitted[0]
    assert request.max_tokens == 16
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0, 0)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1, {})
    assert (request.logprobs, request.prompt_logprobs, request.priority) == (None, None, 0)


def test_every_sampling_parameter_reaches_the_engine(rig: Rig, tokenizer: Tokenizer) -> None:
    answer(
        rig,
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


def test_ignore_eos_leaves_only_the_clients_stop_tokens(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "ab", end=False)
    got = answer(rig, ignore_eos=True, stop_token_ids=[9], max_tokens=5)
    assert rig.engine.submitted[0].stop_token_ids == {9}
    assert got["choices"][0]["text"] == "ababa"
    assert got["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_streamed_text_joined_is_the_plain_text(rig: Rig, batch: int) -> None:
    rig.engine.batch = batch
    events = rig.events(PATH, body())
    assert texts(events) == {0: REPLY}
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert [e["choices"][0]["finish_reason"] for e in events][-1] == "stop"
    assert all("\ufffd" not in event["choices"][0]["text"] for event in events)
    assert all("usage" not in event for event in events)


def test_include_usage_adds_a_last_chunk_and_null_before(rig: Rig) -> None:
    events = rig.events(PATH, body(stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == answer(rig)["usage"]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_stop_string_cuts_at_every_offset(rig: Rig, batch: int) -> None:
    rig.engine.batch = batch
    for start in range(len(REPLY)):
        stop = REPLY[start : start + 3]
        expected = REPLY[: REPLY.index(stop)]
        got = answer(rig, stop=stop)["choices"][0]
        assert (got["text"], got["finish_reason"]) == (expected, "stop")
        assert texts(rig.events(PATH, body(stop=[stop])))[0] == expected


def test_the_stop_string_that_completes_first_wins(rig: Rig) -> None:
    got = answer(rig, stop=["END of it", "END", "zzz"])
    assert got["choices"][0]["text"] == REPLY[: REPLY.index("END")]


def test_include_stop_str_in_output_keeps_the_stop(rig: Rig) -> None:
    got = answer(rig, stop="END", include_stop_str_in_output=True)
    assert got["choices"][0]["text"] == REPLY[: REPLY.index("END") + 3]


def test_a_stop_string_ends_the_request_in_the_engine(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "one END two ", end=False)
    rig.engine.limit = 20  # beyond the stop, and short of max_tokens
    got = answer(rig, stop="END", max_tokens=400)
    assert got["choices"][0]["text"] == "one "
    assert got["usage"]["completion_tokens"] == len("one ") + 1
    rig.engine.wait_until(lambda e: e.aborted == [f"{got['id']}-0"])


def test_before_min_tokens_a_stop_string_is_text(rig: Rig) -> None:
    first = REPLY.index("a")
    assert answer(rig, stop="a")["choices"][0]["text"] == REPLY[:first]
    got = answer(rig, stop="a", min_tokens=first + 1)["choices"][0]["text"]
    assert got == REPLY[: REPLY.index("a", first + 1)]


def test_a_stop_token_is_no_part_of_the_text(rig: Rig, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("END")
    got = answer(rig, stop_token_ids=[token], logprobs=0)["choices"][0]
    assert got["text"] == REPLY[: REPLY.index("END")]
    assert "END" not in got["logprobs"]["tokens"]
    kept = answer(rig, stop_token_ids=[token], include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == REPLY[: REPLY.index("END") + 3]


def test_special_tokens_show_only_when_asked_for(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "a<|start|>b")
    assert answer(rig)["choices"][0]["text"] == "ab"
    assert answer(rig, skip_special_tokens=False)["choices"][0]["text"] == "a<|start|>b"


def test_logprobs_name_every_token_at_its_offset(rig: Rig) -> None:
    got = answer(rig, logprobs=2)["choices"][0]
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
    plain = answer(rig, logprobs=1, stop=stop, echo=True)["choices"][0]
    rig.engine.batch = batch
    events = rig.events(PATH, body(logprobs=1, stop=stop, echo=True))
    assert merged_logprobs(events) == plain["logprobs"]
    assert texts(events)[0] == plain["text"]


def test_echo_prefixes_the_prompt_and_scores_it(rig: Rig) -> None:
    got = answer(rig, prompt="h\u00e9 the", echo=True, logprobs=1)["choices"][0]
    assert got["text"] == "h\u00e9 the" + REPLY
    logprobs = got["logprobs"]
    assert logprobs["tokens"][:5] == ["h", r"bytes:\xc3", r"bytes:\xa9", " ", "the"]
    assert logprobs["text_offset"][:6] == [0, 1, 1, 2, 3, 6]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value is not None for value in logprobs["token_logprobs"][1:])


def test_echo_without_tokens_scores_the_prompt(rig: Rig) -> None:
    got = answer(rig, prompt="the END", echo=True, logprobs=0, max_tokens=0)
    assert got["choices"][0]["text"] == "the END"
    assert got["choices"][0]["logprobs"]["tokens"] == ["the", " ", "END"]
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["usage"]["completion_tokens"] == 0


def test_prompts_of_every_form_give_the_same_ids(rig: Rig, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the")
    for prompt in ("the", ["the"], ids, [ids]):
        answer(rig, prompt=prompt)
    assert {request.prompt for request in rig.engine.submitted} == {tuple(ids)}


def test_an_empty_prompt_begins_with_the_first_token(rig: Rig, tokenizer: Tokenizer) -> None:
    assert answer(rig, prompt="", echo=True)["choices"][0]["text"] == REPLY
    assert rig.engine.submitted[0].prompt == (tokenizer.bos_token_id,)


def test_choices_come_in_the_order_of_their_prompts(rig: Rig, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    rig.engine.script = lambda request: [*request.prompt, eos]
    got = answer(rig, prompt=["a", "b", "c"], n=2)
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [c["text"] for c in got["choices"]] == ["a", "a", "b", "b", "c", "c"]
    assert got["usage"]["prompt_tokens"] == 3
    assert got["usage"]["completion_tokens"] == 12
    assert texts(rig.events(PATH, body(prompt=["a", "b", "c"], n=2))) == dict(enumerate("aabbcc"))


def test_each_choice_has_the_next_seed(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes_its_seed(tokenizer)
    got = answer(rig, n=3, seed=40)
    assert [c["text"] for c in got["choices"]] == ["seed 40", "seed 41", "seed 42"]


def test_without_a_seed_no_two_requests_share_one(rig: Rig) -> None:
    answer(rig)
    answer(rig)
    first, second = rig.engine.submitted
    assert first.sampling.seed != second.sampling.seed


def test_best_of_returns_the_likeliest(rig: Rig, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids

    def script(request: GenerationRequest) -> list[int]:
        # A token's made-up log probability falls with its id modulo 7: 14 is the likeliest.
        return [[20, 20], [14, 14], [16, 16]][request.sampling.seed] + [eos]

    rig.engine.script = script
    got = answer(rig, best_of=3, n=2, seed=0)
    assert [c["index"] for c in got["choices"]] == [0, 1]
    assert [c["text"] for c in got["choices"]] == [tokenizer.decode([i, i]) for i in (14, 16)]
    assert got["choices"][0]["logprobs"] is None
    assert got["usage"]["completion_tokens"] == 9


def test_suffix_is_appended_with_a_warning(rig: Rig) -> None:
    got = answer(rig, suffix=" ever after")
    assert got["choices"][0]["text"] == REPLY + " ever after"
    assert "suffix" in got["warnings"][0]
    events = rig.events(PATH, body(suffix=" ever after"))
    assert texts(events)[0] == REPLY + " ever after"
    assert events[0]["warnings"] == got["warnings"]
    assert all("warnings" not in event for event in events[1:])


def test_unknown_parameters_are_named_in_warnings(rig: Rig) -> None:
    got = answer(rig, frobnicate=None, stream_options=None, Temperature=2)
    assert [warning.split()[0] for warning in got["warnings"]] == ["Temperature", "frobnicate"]
    events = rig.events(PATH, body(stream_options={"include_obfuscation": False}))
    assert events[0]["warnings"][0].startswith("stream_options.include_obfuscation ")


def test_strict_refuses_unknown_parameters(rig: Rig) -> None:
    response = rig.post(PATH, body(frobnicate=1), headers={"X-Inferneo-Strict": "true"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "frobnicate"
    assert rig.post(PATH, body(), headers={"X-Inferneo-Strict": "true"}).status_code == 200


def test_what_cannot_take_effect_is_warned_about(rig: Rig) -> None:
    got = answer(rig, metadata={"a": "b"}, store=True, service_tier="flex", user="me")
    assert [warning.split()[0] for warning in got["warnings"]] == [
        "metadata",
        "store",
        "service_tier",
    ]
    assert "warnings" not in answer(rig, metadata={}, store=False, service_tier="auto")


def test_an_alias_is_echoed_as_it_was_asked_for(rig: Rig) -> None:
    assert answer(rig, model="gpt-4o")["model"] == "gpt-4o"


def test_null_counts_as_absent(rig: Rig) -> None:
    nulls = dict.fromkeys(["stop", "temperature", "n", "logprobs", "suffix", "seed", "echo"])
    assert answer(rig, **nulls)["choices"][0]["text"] == REPLY
