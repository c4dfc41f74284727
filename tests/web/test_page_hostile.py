"""Nothing that a model, a file or a name holds runs, loads anything, or restyles a page."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, Rig
from tests.support.keyed_server import key_rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat, answer, column, file
from tests.web.dashboards import PATH
from tests.web.hostile_texts import ELSEWHERE, MARKDOWN, MARKUP, RUN, TOGETHER, UNICODE

BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
KNOWN = re.compile(
    r"/(|dashboard|docs|ready|metrics|openapi\.json|admin/keys|v1/[a-z/]+|(pages|docs)/[\w.-]+)"
)
"""Paths that the pages ask."""
STATE = """() => {
  const roots = ['#thread', '#history', '#bar', '#card', '#notice', '.models', '.quota'];
  roots.push('.controls', '.notices');
  const within = [...document.querySelectorAll(roots.map((root) => `${root} *`).join())];
  const style = (element) => {
    const { display, position, color, backgroundColor } = getComputedStyle(element);
    return [display, position, color, backgroundColor];
  };
  const own = (element) => [...element.childNodes].filter((node) => node.nodeType === 3);
  return {
    ran: window.ran ?? null,
    tags: [...new Set(within.map((e) => e.localName))],
    attributes: [...new Set(within.flatMap((e) => e.getAttributeNames()))],
    styled: within.filter((e) => e.matches("[style]:not(.bar)")).map((e) => e.outerHTML),
    ids: [...document.querySelectorAll('[id]')].map((e) => e.id),
    links: [...document.querySelectorAll('#thread a')].map((a) => [a.protocol, a.target, a.rel]),
    styles: [...document.styleSheets].map((s) => s.href),
    looks: ['body', 'main', 'h1', 'header'].map((s) => style(document.querySelector(s))),
    frames: window.length,
    wide: document.documentElement.scrollWidth > innerWidth,
    texts: within.flatMap((e) => own(e).map((node) => node.data)).join(''),
  };
}"""
TAGS = """
    a article aside b blockquote br button code dd del details div dl dt em fieldset footer
    form h2 h3 h4 h5 h6 hr i input label legend li ol option p pre progress rect select small
    span strong summary svg table tbody td textarea th thead tr ul
"""
ATTRIBUTES = """
    aria-busy aria-controls aria-current aria-describedby aria-expanded aria-hidden aria-label
    aria-labelledby aria-pressed aria-valuetext class data-state disabled for height hidden
    href id max min name open placeholder rel role rows rx scope selected start style tabindex
    target title type value width
"""


class Guard:
    """Sees all that a page does which only its own scripts may do."""

    def __init__(self, visited: Visit) -> None:
        self.visited, self.page = visited, visited.page
        self.origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.page.url))
        self.dialogs: list[str] = []
        self.asked: list[str] = []
        self.pages: list[Page] = []
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.context.on("page", lambda page: self.pages.append(page))
        self.before = self.page.evaluate(STATE)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def check(self) -> None:
        """Nothing that the page was given has run, loaded, or changed how the page looks."""
        now = self.page.evaluate(STATE)
        assert now["ran"] is None
        assert (self.dialogs, self.pages, now["frames"]) == ([], [], 0)
        for url in self.asked:
            path = url.removeprefix(self.origin)
            assert path != url, f"a request to elsewhere: {url}"
            assert KNOWN.fullmatch(path.partition("?")[0]), path
        assert set(now["tags"]) <= {*TAGS.split()}
        assert set(now["attributes"]) <= {*ATTRIBUTES.split()}
        assert now["styled"] == []
        assert not now["wide"]
        assert len(now["ids"]) == len(set(now["ids"]))
        for protocol, target, rel in now["links"]:
            assert protocol in ("http:", "https:", "mailto:")
            assert (target, rel) == ("_blank", "noopener noreferrer")
        assert (now["styles"], now["looks"]) == (self.before["styles"], self.before["looks"])
        assert not BIDI.search(now["texts"])
        assert self.visited.unexpected() == []  # a violation of the policy is one


@pytest.fixture
def chat(rig: Rig, visit: Callable[..., Visit]) -> Chat:
    found = Chat(visit(rig.url))
    found.button("Chats").click()
    return found


def settle(page: Page) -> None:
    """What was begun by what is drawn has had its turn."""
    settle_frames(page)
    page.wait_for_load_state("networkidle")


def settle_frames(page: Page) -> None:
    """The same for a page that asks all the time."""
    page.evaluate("new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")


@pytest.mark.parametrize(
    ("batch", "parts"), [(1, (*MARKDOWN, *MARKUP, *UNICODE)), (7, (*MARKDOWN, *TOGETHER))]
)
def test_nothing_of_what_a_model_writes_runs(
    rig: Rig, chat: Chat, tokenizer: Tokenizer, batch: int, parts: tuple[str, ...]
) -> None:
    guard, rig.engine.batch = Guard(chat.visited), batch
    for part in parts:
        rig.engine.script = writes(tokenizer, part.replace("\x00", ""))
        chat.button("New chat").click()
        chat.ask(f"{part[:60]}")
        settle(chat.page)
        guard.check()
    chat.visited.shot("hostile-answer")
    chat.page.reload()
    chat.expect_ready()
    settle(chat.page)
    guard.check()


def hostile_file(text: str) -> str:
    """A chat with this text wherever a text may be, and with more than a chat has."""
    column = {"model": text, "system": text, "sampling": {"stop": [text]}, "role": text}
    tokens = [[text, -0.5, [[text, -0.1], ["b", -2]]], ["\n", -1, []]]
    answer = column | {
        "text": text,
        "finish": text,
        "usage": {"prompt": -1, "cached": 1e300, "completion": 2.5},
        "times": {"first": -1, "total": 1e300},
        "tokens": tokens,
        "error": {"title": text, "message": text, "requestId": text, "id": "main"},
        "warnings": [text],
        "tool_calls": [{"id": text, "function": {"name": text, "arguments": text}}],
        "innerHTML": text,
    }
    found = file(
        title=text,
        compare=True,
        columns=[column, column],
        turns=[{"user": text, "answers": [answer, answer], "role": text}],
        id=text,
        toString=text,
        constructor={"prototype": {"polluted": 1}},
    )
    return found.replace('"role"', '"__proto__": {"polluted": 1}, "role"')


def test_nothing_of_a_file_runs(chat: Chat, tmp_path: Path) -> None:
    guard = Guard(chat.visited)
    chat.button("Settings").click()
    for probabilities, parts in enumerate([(*MARKDOWN, *MARKUP, *UNICODE), TOGETHER]):
        if probabilities:
            chat.button("Probabilities").click()
        for part in parts:
            chat.load(hostile_file(part))
            expect(chat.answers).to_have_count(2)
            settle(chat.page)
            if probabilities:
                chat.page.locator(".token").first.hover()
            guard.check()
            assert chat.page.evaluate("({}).polluted ?? [].polluted ?? null") is None
        chat.visited.shot(f"hostile-file-{probabilities}")
    chat.page.reload()
    chat.expect_ready()
    guard.check()
    for kind, ending in (("JSON", "json"), ("Markdown", "md")):
        with chat.page.expect_download() as download:
            chat.button(f"Export {kind}").click()
        assert re.fullmatch(rf"[\w-]+\.{ending}", download.value.suggested_filename)
        download.value.save_as(tmp_path / kind)
    chat.load((tmp_path / "JSON").read_text(encoding="utf-8"))
    expect(chat.answers).to_have_count(2)
    guard.check()


def mutants() -> Iterator[str]:
    """A whole chat with one of its values replaced, each by each of many."""
    whole = json.loads(hostile_file("x"))
    del whole["turns"][0]["answers"][1]
    odd: list[Any] = [None, True, -1, 10**400, math.inf, "", "constructor", "\ud800"]
    odd += [[], {}, [[]], [None], {"length": 1}, {"__proto__": []}, ["x"] * 3, [{}, {}, {}]]

    def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if path:
            yield path
        if isinstance(value, dict | list):
            for name, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from paths(each, (*path, name))

    for path, value in itertools.product(paths(whole), odd):
        changed = copy.deepcopy(whole)
        *above, last = path
        place = changed
        for name in above:
            place = place[name]
        place[last] = value
        yield json.dumps(changed).replace("Infinity", "1e999")


def test_a_chat_with_any_part_replaced_is_refused_or_shown(chat: Chat) -> None:
    chat.ask("Stay")
    chat.button("Settings").click()
    chat.button("Probabilities").click()
    guard = Guard(chat.visited)
    shown, refused = chat.page.evaluate(
        """async (texts) => {
          const { fromFile, toJson, toMarkdown } = await import('/pages/chat-file.js');
          const refused = new Set();
          let shown = 0;
          for (const text of texts) {
            let chat;
            try {
              chat = await fromFile(new File([text], 'f.json'));
            } catch (error) {
              refused.add(`${error.name}: ${error.message}`);
              continue;
            }
            await fromFile(new File([toJson(chat)], 'again.json'));
            toMarkdown(chat);
            // As after an import: it is kept, and opened.
            localStorage.setItem('inferneo.chat.id', JSON.stringify({ ...chat, id: 'id' }));
            document.getElementById('new-chat').click();
            const rows = [...document.querySelectorAll('#history button.open')];
            rows.find((row) => row.textContent !== 'Stay').click();
            shown += document.querySelectorAll('.turn').length === chat.turns.length;
          }
          return [shown, [...refused]];
        }""",
        texts := list(mutants()),
    )
    assert shown > len(texts) / 4
    assert len(refused) > 50
    for reason in refused:
        assert re.match(r"Error: f\.json is (damaged: \w|of version|JSON, but no chat)", reason)
    guard.check()
    chat.page.reload()
    chat.expect_ready()
    chat.button("Stay").click()
    assert chat.said()[0] == "Stay"


def test_a_file_that_is_refused_leaves_all_as_it_was(chat: Chat, tmp_path: Path) -> None:
    chat.ask("Stay")
    said, guard = chat.said(), Guard(chat.visited)
    entries = [f"Object.entries({name}Storage).sort()" for name in ("local", "session")]
    kept = f"JSON.stringify([{', '.join(entries)}])"
    before = chat.page.evaluate(kept)
    huge = tmp_path / "huge.json"
    with huge.open("w") as out:
        out.write("[" + "1," * 25_000_001 + "1]")
    deep = "[" * 1_000_000
    hot = column() | {"sampling": {"temperature": 9}}
    refused = {
        "not json": "is not JSON",
        "[1, 2]": "no chat of this page",
        "null": "no chat of this page",
        file(version=2): "of version 2; this page reads version 1",
        file(turns=[{"user": 3, "answers": []}]): "damaged: turns[0].user is not",
        file(turns=answer(text=None)): "damaged: turns[0].answers[0].text is not",
        file(turns=answer(tokens=[["a", "b", []]])): "turns[0].answers[0].tokens[0] is not",
        file(turns=answer(usage={"prompt": 1})): "turns[0].answers[0].usage.cached is not",
        file(columns=[column()]): "damaged: columns is not",
        file(columns=[column(), hot]): "damaged: columns[1].sampling.temperature is not",
        file(columns=[column() | {"sampling": {"stop": None}}, column()]): "sampling.stop is not",
        file(turns=answer(times={"total": math.inf})).replace(
            "Infinity", "1e999"
        ): "times.total is",
        file(turns=answer(warnings=["w"] * 101)): "warnings has 101 entries; at most 100 are read",
        file(turns=answer(tokens=[["a", 0, [["b", 0]] * 21]])): "answers[0].tokens[0] is not",
        file(turns=answer(model="m" * 10_001)): "answers[0].model is not",
        file(turns=[{"user": "", "answers": []}] * 2001): "turns has 2,001 entries; at most 2,000",
        file(turns=answer(text="- a\n" * 250_001)): "has 1,000,006 characters in messages and",
        deep: "is not JSON",
        deep + "]" * 1_000_000: "no chat of this page",
        file(turns=answer(tokens=[["a", 0, [1]]])).replace(
            "[1]", deep[:9999] + "]" * 9999
        ): "tokens[0] is",
        file(version="<img src=/ran>" * 9): 'of version "<img src=/ran><img ',
        file(version={"<b>": 1}): 'of version {"<b>":1}',
        file(
            turns=answer(text="hello " * 200_000)
        ): "has 1,200,002 characters in messages and answers",
        file(
            turns=answer(tokens=[["a", 0, []]] * 60_000) * 2
        ): "has 120,000 tokens with probabilities",
        "\ufeff\u202e{}": "is not JSON",
    }
    wrong = chat.page.locator("#history").get_by_role("alert")
    for text, reason in refused.items():
        chat.load(text, "<img src=x onerror=alert(1)>.json")
        expect(wrong).to_contain_text(reason)
        expect(wrong).to_contain_text("<img src=x onerror=alert(1)>.json")
    with chat.page.expect_file_chooser() as chooser:
        chat.button("Import").click()
    chooser.value.set_files(huge)
    expect(wrong).to_contain_text("huge.json is too large to be a chat.")
    assert chat.page.evaluate(kept) == before
    guard.check()
    chat.page.reload()
    chat.expect_ready()
    assert chat.said() == said


def fulfil(page: Page, path: str, body: Any, status: int = 200) -> None:
    """Have the page believe that the server says this at a path."""

    def reply(route: Route) -> None:
        kind = "text/plain" if isinstance(body, str) else "application/json"
        text = body if isinstance(body, str) else json.dumps(body)
        route.fulfill(status=status, content_type=kind, body=text)

    page.route(f"**/{path}", reply)


@pytest.mark.parametrize("part", TOGETHER)
def test_nothing_of_a_name_or_an_error_runs(
    rig: Rig, visit: Callable[..., Visit], part: str
) -> None:
    visited = visit(rig.url)
    visited.expected = ["status of 400"]
    guard = Guard(visited)
    model = {"id": part, "object": "model", "owned_by": part}
    fulfil(visited.page, "v1/models", {"data": [model]})
    fulfil(visited.page, "ready", {"status": "ready", "models": [{"id": part, "kind": part}]})
    error = {"error": {"message": part, "code": part, "param": part, "type": part}}
    fulfil(visited.page, "v1/chat/completions", error, 400)
    visited.page.reload()
    chat = Chat(visited)
    expect(chat.page.get_by_role("heading", name="Talk to")).to_be_visible()
    chat.page.get_by_text("The same from a program").click()
    guard.check()
    chat.ask(part)
    expect(chat.answers.get_by_role("alert")).to_contain_text("The server refused this")
    guard.check()
    loading = {"id": part, "stage": part, "done": part, "total": part}
    fulfil(visited.page, "ready", {"status": "loading", "models": [loading]})
    code = {"error": {"message": part, "code": "model_loading"}}
    fulfil(visited.page, "v1/chat/completions", code, 503)
    visited.expected.append("status of 503")
    chat.button("New chat").click()
    chat.send("Hello")
    expect(chat.answers.last.locator(".note")).to_contain_text("Waiting for the model.")
    guard.check()
    chat.button("Stop").click()


@pytest.mark.parametrize("part", TOGETHER)
def test_nothing_of_a_name_runs_on_the_dashboard(
    tokenizer: Tokenizer, tmp_path: Path, visit: Callable[..., Visit], part: str
) -> None:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as keys:
        _, text = keys.key(scopes=frozenset({"admin", "metrics"}))
        listed = keys.client.get("/admin/keys", headers={"Authorization": f"Bearer {text}"}).json()
        figures = keys.client.get("/metrics", headers={"Authorization": f"Bearer {text}"}).text
        visited = visit(keys.url)
        page, visited.expected = visited.page, ["status of 401"]
        page.evaluate(f"sessionStorage.setItem('inferneo.key', {json.dumps(text)})")
        data = [listed["data"][0] | {"name": part, "id": part, "scopes": [part]}]
        fulfil(page, "admin/keys", listed | {"data": data})
        label = part.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        fulfil(page, "metrics", figures.replace(f'"{CHAT}"', f'"{label}"'))
        page.goto(keys.url + PATH)
        expect(page.get_by_role("region", name="Output", exact=True)).to_be_visible()
        guard = Guard(visited)
        expect(page.get_by_role("table").filter(has_text="Requests, today")).to_be_visible()
        expect(page.locator(".models article")).to_have_count(2)
        settle_frames(page)
        guard.check()
        error = {"error": {"message": part, "code": part}}
        for path, status in (("metrics", 403), ("ready", 500)):
            fulfil(page, path, error, status)
        visited.expected += ["status of 403", "status of 500"]
        expect(page.locator(".notices")).to_contain_text("Not allowed")
        settle_frames(page)
        guard.check()
        visited.shot(f"hostile-dashboard-{part[0] == '<'}")


QUERIES = (
    f"url={ELSEWHERE}",
    "url=/ran",
    f"configUrl={ELSEWHERE}",
    f"urls.primaryName=<img src=/ran onerror={RUN}>",
    f"spec={{}}&dom_id=%23x&validatorUrl={ELSEWHERE}&oauth2RedirectUrl=javascript:alert(1)",
    f"layout=<script>{RUN}</script>#/<img src=/ran onerror={RUN}>",
    f"every={RUN}#main",
)


@pytest.mark.parametrize("path", ["/", "/dashboard", "/docs"])
def test_nothing_of_an_address_runs(rig: Rig, visit: Callable[..., Visit], path: str) -> None:
    visited = visit(rig.url + path)
    page = visited.page
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    dialogs: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    title = page.title()
    assert title.endswith("Inferneo-JAX")
    for query in QUERIES:
        asked.clear()
        page.goto(f"{rig.url}{path}?{query}")
        if path == "/docs":
            listed = page.get_by_role("link", name="/v1/chat/completions", exact=True)
            expect(listed).to_be_visible()
        else:
            settle_frames(page)
        assert page.evaluate("window.ran ?? null") is None
        assert dialogs == []
        assert page.title() == title
        assert asked
        for url in asked:
            assert url.startswith(f"{rig.url}/")
            assert "/ran" not in url.partition("?")[0]
