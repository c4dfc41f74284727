"""What the chat page does when the server refuses, fails, loads or goes away."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from inferneo_jax import EngineFailedError, OverloadedError, Tokenizer
from server.keys import lookup
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig, loading
from tests.support.keyed_server import FREE, KeyRig, key_rig
from tests.web.browsing import Visit, use_key
from tests.web.chatting import Cable, Chat, asked

REQUEST = re.compile(r"Request req_\w+")


@pytest.fixture(scope="module")
def keys(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyRig]:
    location = str(tmp_path_factory.mktemp("keys") / "keys.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "FRESH_SECONDS", 0.0)  # what is changed here counts at once
        with key_rig(tokenizer, location, require_key="true") as found:
            yield found


def test_a_key_is_asked_for_explained_and_used(keys: KeyRig, visit: Callable[..., Visit]) -> None:
    visited = visit(keys.url)
    visited.expected = ["401"]
    dialog = visited.page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text("A key is needed. This server needs an API")
    use_key(visited, "sk-nonsense")
    expect(dialog.get_by_role("alert")).to_contain_text("The key is not valid. What was sent is no")
    key, text = keys.key()
    use_key(visited, text)
    chat = Chat(visited)
    chat.ask("Hello")
    assert chat.said() == ["Hello", REPLY]
    # A key that stops to count in mid-chat: the message goes out again with the next one.
    keys.change(key, revoked=1.0)
    chat.send("Again")
    expect(dialog.get_by_role("alert")).to_contain_text("This API key was revoked.")
    expect(chat.answers.last.locator(".failure")).to_contain_text(REQUEST)
    use_key(visited, keys.key()[1])
    chat.expect_done()
    expect(chat.answers.last).to_contain_text(REPLY)
    assert chat.said() == ["Hello", REPLY, "Again", REPLY]


def test_a_key_is_in_no_url_no_storage_of_chats_and_no_file(
    keys: KeyRig, visit: Callable[..., Visit], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    visited = visit(keys.url)
    visited.expected = ["401"]
    text = keys.key()[1]
    requests: list[Any] = []
    visited.page.on("request", lambda request: requests.append(request))
    use_key(visited, text)
    chat = Chat(visited)
    chat.ask("Hello")
    chat.button("Chats").click()
    for kind in ("JSON", "Markdown"):
        with visited.page.expect_download() as download:
            chat.button(f"Export {kind}").click()
        saved = tmp_path / kind
        download.value.save_as(saved)
        assert "Hello" in saved.read_text(encoding="utf-8")
        assert text not in saved.read_text(encoding="utf-8")
    assert requests
    for request in requests:
        assert text not in request.url
        assert text not in (request.post_data or "")
    kept = "Object.entries(localStorage).filter(([name]) => name !== 'inferneo.key')"
    assert text not in str(visited.page.evaluate(kept))
    visited.page.reload()
    chat.expect_ready()  # kept for the tab
    output = capfd.readouterr()
    assert text not in output.out + output.err


def test_a_limit_says_when_to_try_again(keys: KeyRig, visit: Callable[..., Visit]) -> None:
    visited = visit(keys.url)
    visited.expected = ["401", "429"]
    key, text = keys.key(dataclasses.replace(FREE, requests=1))
    use_key(visited, text)
    chat = Chat(visited)
    chat.ask("One")
    chat.send("Two")
    failure = chat.answers.last.locator(".failure")
    expect(failure.get_by_role("alert")).to_contain_text("Too many requests")
    expect(failure).to_contain_text(re.compile(r"possible in \d+ s"))
    keys.change(key, limits=FREE)
    failure.get_by_role("button", name="Try again").click()
    chat.expect_done()
    assert chat.said() == ["One", REPLY, "Two", REPLY]


def test_a_model_that_the_key_may_not_use(keys: KeyRig, visit: Callable[..., Visit]) -> None:
    visited = visit(keys.url)
    visited.expected = ["401", "403"]
    key, text = keys.key()
    use_key(visited, text)
    chat = Chat(visited)
    keys.change(key, models=[EMBED])
    chat.send("Hello")
    alert = chat.answers.get_by_role("alert")
    expect(alert).to_contain_text("Not allowed")
    expect(alert).to_contain_text(f"may not use the model '{CHAT}'")
    visited.page.reload()
    expect(visited.page.get_by_text("No model here generates text")).to_be_visible()
    expect(chat.button("Send")).to_be_disabled()


def test_a_server_for_its_own_machine_says_whom_it_serves(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    visited = visit(rig.url, extra_http_headers={"X-Forwarded-For": "192.0.2.1"})
    visited.expected = ["403"]
    alert = visited.page.get_by_role("alert").filter(has_text="serves its own machine only")
    expect(alert).to_contain_text("Not allowed")


def test_an_engine_that_fails_in_mid_answer_leaves_what_was_said(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    chat = Chat(visit(rig.url))
    rig.engine.limit, rig.engine.failure = 6, EngineFailedError("it failed")
    chat.send("Hello")
    alert = chat.answers.get_by_role("alert")
    expect(alert).to_contain_text("The server failed")
    expect(alert).to_contain_text("The engine failed while it had this request.")
    expect(alert).to_contain_text(REQUEST)
    assert chat.said()[1].startswith(REPLY[:4])
    chat.page.reload()  # it is not forgotten
    expect(alert).to_contain_text("The server failed")
    rig.engine.failure, rig.engine.limit = None, None
    chat.expect_ready()
    chat.button("Try again").click()
    chat.expect_done()
    assert chat.said() == ["Hello", REPLY]
    expect(alert).to_have_count(0)


def test_a_busy_server_is_asked_again(rig: Rig, visit: Callable[..., Visit]) -> None:
    chat = Chat(visit(rig.url))
    chat.visited.expected = ["503"]
    rig.engine.refusal = OverloadedError("too many requests wait")
    chat.send("Hello")
    expect(chat.answers.get_by_role("alert")).to_contain_text("The server is busy")
    rig.engine.refusal = None
    chat.ask("More")
    expect(chat.button("Try again")).to_have_count(0)  # it would undo what came after
    assert asked(rig.engine) == [("user", "Hello"), ("user", "More")]
    chat.messages.last.get_by_role("button", name="Delete").click()
    chat.button("Try again").click()
    chat.expect_done()
    assert chat.said() == ["Hello", REPLY]


def test_a_server_that_goes_away_leaves_what_was_said(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    with Cable(rig.server.port) as cable:
        chat = Chat(visit(cable.url))
        chat.visited.expected = ["ERR_"]
        rig.engine.limit = 6
        chat.send("Hello")
        expect(chat.answers).to_contain_text(REPLY[:4])
        cable.cut()
        failure = chat.answers.locator(".failure")
        expect(failure).to_contain_text("The server cannot be reached")
        expect(failure).to_contain_text("The connection was lost before the answer was whole.")
        assert chat.said()[1].startswith(REPLY[:4])
        rig.engine.wait_until(lambda e: e.num_running == 0)
        chat.button("Try again").click()
        expect(failure).to_contain_text("No answer came.")


def test_the_page_waits_for_models_and_goes_on_by_itself(
    tokenizer: Tokenizer, visit: Callable[..., Visit]
) -> None:
    with loading(tokenizer, "compile", 5, 20) as (server, engine, go_on):
        visited = visit(server.url)
        visited.expected = ["503"]
        notice = visited.page.locator("#notice")
        expect(notice).to_contain_text(f"The models are being loaded. {CHAT}: compile 25 %")
        expect(visited.page.get_by_role("button", name="Send")).to_be_disabled()
        go_on.set()
        chat = Chat(visited)
        expect(notice).to_be_hidden()
        chat.ask("Hello")
        assert asked(engine) == [("user", "Hello")]
