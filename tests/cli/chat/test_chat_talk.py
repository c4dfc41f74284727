"""A conversation with a server: what is asked, kept and told."""

import io
import re
from pathlib import Path

import orjson
import pytest

from inferneo_jax import EngineFailedError, Tokenizer
from server.cli.chat import commands
from server.cli.chat.client import Answer, ChatError, NoServerError, Server
from server.cli.chat.dialogue import Turn
from server.keys.key import Limits
from tests.cli.chat.chats import Paper, answering, talk_to
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig
from tests.support.keyed_server import key_rig
from tests.support.paths import ROOT

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def chunk(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"


def refusal(message: str) -> bytes:
    body = orjson.dumps({"error": {"message": message}})
    return b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def test_an_answer_is_shown_and_kept_with_its_figures(rig: Rig) -> None:
    talk = talk_to(rig.url)
    talk.ask("Hello?")
    assert talk.dialogue.turns == (Turn("Hello?", REPLY),)
    shown = talk.screen.text
    assert shown.startswith(f"{REPLY}\n")
    assert "first after 0." in shown
    assert "complete" in shown
    tokens = len(rig.engine.script(rig.engine.submitted[-1]))
    assert f"\n{tokens} tokens · " in shown


def test_reasoning_is_shown_before_the_answer_and_not_kept() -> None:
    delta = {"reasoning_content": "Hm, why?", "reasoning": "Hm, why?"}
    thought = b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta}]}) + b"\n\n"
    reply = HEAD + thought + chunk("So.") + chunk(" So.", "stop") + b"data: [DONE]\n\n"
    with answering(reply) as url:
        talk = talk_to(url)
        talk.ask("Hello?")
    assert talk.screen.complaints == "Hm, why?"
    assert talk.screen.text.startswith("So. So.\n")
    assert talk.dialogue.turns == (Turn("Hello?", "So. So."),)


def test_the_next_question_has_what_was_said_before(rig: Rig, tokenizer: Tokenizer) -> None:
    talk = talk_to(rig.url)
    commands.run("/system Be brief.", talk)
    commands.run("/set temperature 0", talk)
    talk.ask("One?")
    talk.ask("Two?")
    request = rig.engine.submitted[-1]
    prompt = tokenizer.decode(request.prompt, skip_special_tokens=True)
    assert (
        prompt.index("Be brief.")
        < prompt.index("One?")
        < prompt.index("END")
        < prompt.index("Two?")
    )
    assert request.sampling.temperature == 0


def test_what_ctrl_c_cuts_is_kept_and_the_server_stops(rig: Rig) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "C" in text:
                rig.engine.wait_until(lambda e: e.num_written == 3)
                raise KeyboardInterrupt
            return super().write(text)

    rig.engine.limit = 3
    talk = talk_to(rig.url, Paper(Interrupted()))
    talk.ask("Hello?")
    (turn,) = talk.dialogue.turns
    assert turn.answer
    assert REPLY.startswith(turn.answer)
    assert "stopped" in talk.screen.text
    rig.engine.wait_until(lambda e: len(e.aborted) == 1)


def test_retry_asks_again_and_undo_takes_back(rig: Rig, tokenizer: Tokenizer) -> None:
    talk = talk_to(rig.url)
    talk.ask("One?")
    talk.ask("Two?")
    rig.engine.script = writes(tokenizer, "Better.")
    commands.run("/retry", talk)
    assert talk.dialogue.turns == (Turn("One?", REPLY), Turn("Two?", "Better."))
    prompts = [request.prompt for request in rig.engine.submitted]
    assert prompts[1] == prompts[2]
    commands.run("/undo", talk)
    assert talk.dialogue.turns == (Turn("One?", REPLY),)
    commands.run("/clear", talk)
    assert talk.dialogue.turns == ()
    for command in ("/undo", "/retry"):
        with pytest.raises(ChatError, match=r"Nothing was (said|asked) yet"):
            commands.run(command, talk)


def test_a_question_that_failed_can_be_asked_again(rig: Rig) -> None:
    talk = talk_to(rig.url)
    commands.run("/set max_tokens 100000", talk)
    talk.ask("Hello?")
    assert "/undo takes back the last turn" in talk.screen.complaints
    assert talk.dialogue.turns == ()
    commands.run("/set max_tokens default", talk)
    commands.run("/retry", talk)
    assert talk.dialogue.turns == (Turn("Hello?", REPLY),)


def test_a_retry_that_fails_loses_no_answer(rig: Rig) -> None:
    talk = talk_to(rig.url)
    talk.ask("Hello?")
    rig.engine.refusal = EngineFailedError("it broke")
    commands.run("/retry", talk)
    assert "engine failed" in talk.screen.complaints
    assert talk.dialogue.turns == (Turn("Hello?", REPLY),)


def test_an_answer_that_breaks_off_keeps_what_was_said(rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 3, EngineFailedError("it broke")
    talk = talk_to(rig.url)
    talk.ask("Hello?")
    assert "engine failed" in talk.screen.complaints
    assert "/retry asks again" in talk.screen.text
    assert REPLY.startswith(talk.dialogue.turns[0].answer)
    with answering(HEAD + chunk("Once upon")) as url:
        lost = talk_to(url)
        lost.ask("Tell me.")
    assert lost.dialogue.turns == (Turn("Tell me.", "Once upon"),)
    assert "ended before the answer did" in lost.screen.complaints


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhello\n\n", "is it the right address?"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\n<p>", "answers with the status 502"),
        (b"", "was lost"),
        (refusal("Shutting \x1b[1mdown."), "Shutting \u241b[1mdown. Try again in 7 s: /retry."),
    ],
)
def test_answers_that_are_none_are_told_in_words(reply: bytes, message: str) -> None:
    with answering(reply) as url:
        talk = talk_to(url)
        talk.ask("Hello?")
    assert message in talk.screen.complaints
    assert talk.pending == "Hello?"


def test_no_server_is_told() -> None:
    with answering() as url:
        pass
    with pytest.raises(NoServerError, match=f"No server answers at {url}"):
        Server(url).greet()
    with pytest.raises(ChatError, match="write http://host:port"):
        Server("ftp://host")


def test_keys_are_asked_for_until_one_counts_and_a_limit_says_when_to_ask_again(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as rig:
        _, text = rig.key()
        talk = talk_to(rig.url, key="wrong")
        talk.ask("Hello?")
        assert "key" in talk.screen.complaints
        assert talk.dialogue.turns == ()
        given = iter(["worse", text])
        talk._ask_key = lambda: next(given)
        commands.run("/retry", talk)
        assert talk.dialogue.turns == (Turn("Hello?", REPLY),)
        talk.server.key, talk._ask_key = "wrong", lambda: ""
        talk.ask("Hello?")
        assert "Without an API key" in talk.screen.complaints
        assert text not in talk.screen.text + talk.screen.complaints

        limited = talk_to(rig.url, key=rig.key(Limits(requests=1))[1])
        limited.ask("One?")
        limited.ask("Two?")
    assert len(limited.dialogue.turns) == 1
    assert "Try again in" in limited.screen.complaints


def test_models_that_chat_are_shown_and_chosen(rig: Rig) -> None:
    assert Server(rig.url + "/v1/").models() == [CHAT]
    talk = talk_to(rig.url)
    commands.run("/model", talk)
    assert talk.screen.text == f"* {CHAT}\n"
    commands.run("/model gpt-4o", talk)
    assert talk.dialogue.model == "gpt-4o"
    with pytest.raises(ChatError, match="does not exist; there are"):
        commands.run("/model none", talk)
    assert talk.dialogue.model == "gpt-4o"
    commands.run(f"/model {EMBED}", talk)
    talk.ask("Hello?")
    assert "makes embeddings and no text" in talk.screen.complaints


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature 3", "temperature is 3; it must be at most 2."),
        ("temperature hot", "temperature is 'hot'; it must be a number."),
        ("min_tokens -1", "at least 0"),
        ("temprature 1", "did you mean temperature?"),
        ("messages []", "cannot be set; there are"),
        ("temperature", "needs a value"),
    ],
)
def test_parameters_are_refused_in_the_servers_words(rig: Rig, text: str, message: str) -> None:
    talk = talk_to(rig.url)
    before = talk.dialogue
    with pytest.raises(ChatError) as raised:
        commands.run(f"/set {text}", talk)
    assert message in str(raised.value)
    assert talk.dialogue == before


def test_help_names_every_command_and_unknown_ones_are_told() -> None:
    talk = talk_to("http://127.0.0.1:1")
    commands.run("/help", talk)
    for name in commands.COMMANDS:
        assert f"\n/{name}" in f"\n{talk.screen.text}"
    with pytest.raises(ChatError, match="no command /hepl"):
        commands.run("/hepl", talk)
    assert not commands.run("/etc/passwd holds what?", talk)
    assert not commands.run("What is /help?", talk)
    with pytest.raises(commands.Leave):
        commands.run("/exit", talk)


def test_the_manual_names_every_command() -> None:
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`/([a-z]+)[ `]", page)) == commands.COMMANDS.keys()


def test_what_is_saved_can_be_gone_on_with(rig: Rig, tmp_path: Path) -> None:
    talk = talk_to(rig.url)
    talk.ask("Hello?")
    path = tmp_path / "chat.md"
    commands.run(f"/save {path}", talk)
    with pytest.raises(ChatError, match="there already"):
        commands.run(f"/save {path}", talk)
    other = talk_to(rig.url)
    commands.run(f"/load {path}", other)
    assert other.dialogue == talk.dialogue
    with pytest.raises(ChatError, match="Name a file"):
        commands.run("/save", talk)


def test_figures_are_those_of_the_answer() -> None:
    answer = Answer("text", "stop", 11, first=0.5, last=1.5)
    assert answer.rate == 10
    assert Answer("text", "stop", 1, first=0.5, last=0.5).rate is None


CONTROLS = "\x1b]52;c;cm0gLXJm\x07\x9b2J\x1bc\u202e\u2066\x00"


def plain(text: str) -> bool:
    """Whether a terminal would obey nothing of it."""
    return not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text
    )


def test_no_control_of_a_model_or_a_server_is_shown(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, f"{CONTROLS}[0m the text")
    talk = talk_to(rig.url)
    talk.ask(f"{CONTROLS}?")
    commands.run(f"/system {CONTROLS}", talk)
    commands.run("/undo", talk)
    assert "the text" in talk.screen.text
    message = orjson.dumps({"error": {"message": CONTROLS}})
    head = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(message)
    warnings = b"data: " + orjson.dumps({"warnings": [CONTROLS], "choices": []}) + b"\n\n"
    replies = [
        head + message,
        HEAD + warnings + chunk(CONTROLS, CONTROLS) + b"data: [DONE]\n\n",
        HEAD + b"data: " + message + b"\n\n",
    ]
    with answering(*replies) as url:
        other = talk_to(url, talk.screen)
        for _ in replies:
            other.ask("?")
    assert other.dialogue.turns[0].answer == CONTROLS  # kept as it came
    assert plain(talk.screen.text)
    assert plain(talk.screen.complaints)
    assert talk.screen.complaints.count("\u241b]52;c;cm0gLXJm\u2407") == 2


@pytest.mark.parametrize(
    "event",
    [
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"[" * 100_000,
        b'{"choices": 3}',
        b'{"choices": [3]}',
        b'{"choices": {"a": 1}}',
        b'{"choices": [{"delta": 3}]}',
        b'{"choices": [{"delta": {"content": "\\ud800"}}]}',
        b'{"error": 3}',
        b'{"error": {"message": null}}',
        b'{"usage": {"completion_tokens": "\xff"}}',
        b'{"usage": 3}',
        b'{"warnings": 3}',
    ],
)
def test_an_answer_of_another_form_is_an_error_in_words(event: bytes) -> None:
    with answering(HEAD + b"data: " + event + b"\n\n") as url:
        talk = talk_to(url)
        talk.ask("?")
    assert talk.screen.complaints.startswith("error: ")
    assert talk.pending == "?"


def test_a_reason_of_another_form_is_shown() -> None:
    event = b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": {"a": [1]}}]}\n\n'
    with answering(HEAD + event + b"data: [DONE]\n\n") as url:
        talk = talk_to(url)
        talk.ask("?")
    assert "{'a': [1]}" in talk.screen.text


@pytest.mark.parametrize(
    "models",
    [
        b"[" * 100_000,
        b"3",
        b"[3]",
        b'[{"id": 3}]',
        b'[{"id": "x", "stage": 3}]',
        b'[{"id": "x", "stage": "loading", "done": "1", "total": 2}]',
        b'[{"id": "x", "stage": "loading", "done": 1, "total": 1e400}]',
        b'[{"id": "x", "stage": "loading", "done": -1, "total": 18446744073709551615}]',
    ],
)
def test_a_state_of_another_form_is_none(models: bytes) -> None:
    body = b'{"models": %s}' % models
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with answering(reply) as url:
        assert Server(url).states() == []
