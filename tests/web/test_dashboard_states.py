"""The dashboard with keys and without, while models load, and while the server is gone."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Request, expect

from inferneo_jax import Tokenizer
from server.keys.key import Limits
from tests.support.fake_server import CHAT, Rig, loading
from tests.support.keyed_server import KeyRig, key_rig
from tests.web.browsing import Visit, use_key
from tests.web.dashboards import PATH, number, open_dashboard, streams, tile, value, wait_for

REFUSED = ["status of 401", "status of 403", "status of 503"]
BROKEN = ["ERR_FAILED"]


@pytest.fixture
def keyed(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[KeyRig]:
    with key_rig(tokenizer, str(tmp_path / "keys.db"), require_key="true") as rig:
        yield rig


def count_metrics(page: Page) -> list[Request]:
    """Grows with each time that the page asks for figures."""
    asked: list[Request] = []
    page.on("request", lambda each: asked.append(each) if "/metrics" in each.url else None)
    return asked


def test_a_key_is_asked_for_and_what_it_may_see_is_shown(
    keyed: KeyRig, visit: Callable[..., Visit]
) -> None:
    visited = visit(keyed.url + PATH)
    page, visited.expected = visited.page, REFUSED
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    expect(page.get_by_text("A key is needed")).to_be_visible()
    expect(page.get_by_role("article").filter(has_text=CHAT)).to_be_visible()  # of /ready
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    expect(tile(page, "Output")).to_be_hidden()
    visited.assert_accessible()
    visited.shot("dashboard-no-key")

    _, poor = keyed.key(scopes=frozenset({"inference"}))
    page.get_by_role("button", name="Enter a key").click()
    use_key(visited, poor)
    expect(page.get_by_text("This API key lacks the scope metrics")).to_be_visible()
    expect(page.get_by_text("with the scope admin")).to_be_visible()

    _, screen = keyed.key(scopes=frozenset({"metrics"}))
    page.get_by_role("button", name="API key").click()
    use_key(visited, screen)
    expect(tile(page, "Output")).to_be_visible()
    expect(page.get_by_text("Figures need a key")).to_be_hidden()
    expect(page.get_by_role("table")).to_have_count(0)
    expect(page.get_by_text("with the scope admin")).to_be_visible()
    assert not [url for url in urls if "inferneo-" in url]


def test_an_administrator_sees_what_each_key_uses(
    keyed: KeyRig, visit: Callable[..., Visit]
) -> None:
    _, admin = keyed.key(scopes=frozenset({"admin", "metrics"}))
    visited = visit(keyed.url + PATH)
    page, visited.expected = visited.page, REFUSED
    page.get_by_role("button", name="Enter a key").click()
    use_key(visited, admin)
    limits = Limits(requests=8, tokens=None, day_requests=4, concurrent=2)
    key, text = keyed.key(limits)
    keyed.engine.limit = 1
    row = page.get_by_role("row").filter(has_text=key.id)
    with streams(keyed.rig, 2, {"Authorization": f"Bearer {text}"}):
        expect(row.get_by_role("cell")).to_contain_text(["2 / 8", "no limit", "2 / 4", "2 / 2"])
        expect(page.get_by_role("row").nth(1)).to_contain_text(key.id)  # the fullest
        visited.assert_accessible()
        page.get_by_role("heading", name="Limits of API keys").scroll_into_view_if_needed()
        visited.shot("dashboard-quota")
    expect(row.get_by_role("cell").nth(3)).to_contain_text("0 / 2")
    keyed.store.change_key(key.id, {"revoked": "1.0"})
    expect(row).to_have_count(0)


def test_loading_is_shown_with_its_progress(
    tokenizer: Tokenizer, visit: Callable[..., Visit]
) -> None:
    with loading(tokenizer, "compiling", 3, 12) as (server, _, go_on):
        visited = visit(server.url + PATH)
        page, visited.expected = visited.page, REFUSED
        expect(page.get_by_text("Loading models")).to_be_visible()
        expect(page.get_by_text("compiling, 3 of 12").first).to_be_visible()
        expect(page.get_by_role("progressbar").first).to_have_attribute("value", "3")
        expect(page.get_by_role("article")).to_have_count(2)
        visited.assert_accessible()
        visited.shot("dashboard-loading")
        go_on.set()
        expect(page.get_by_text("Ready", exact=True)).to_be_visible()
        expect(tile(page, "Requests")).to_be_visible()
        page.close()


def test_a_server_that_is_gone_is_asked_again_and_the_plots_are_kept(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    visited = open_dashboard(visit, rig.url)
    page, visited.expected = visited.page, BROKEN
    wait_for(lambda: value(page, "Requests", 2) == 4)
    page.route(re.compile("/(metrics|ready)$"), lambda route: route.abort())
    expect(page.get_by_text("The server cannot be reached")).to_be_visible()
    expect(page.get_by_text("No answer", exact=True)).to_be_visible()
    assert number(page, "Requests", 2) == "4"
    expect(tile(page, "Requests").locator("path.line-2").last).to_have_attribute(
        "d", re.compile("^M")
    )
    visited.assert_accessible()
    visited.shot("dashboard-gone")
    page.unroute_all()
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    expect(page.get_by_text("The server cannot be reached")).to_be_hidden()
    wait_for(lambda: len(path(page).split("M")) == 3)  # two stretches, and a gap between them


def path(page: Page) -> str:
    return tile(page, "Requests").locator("svg.plot path.line-2").get_attribute("d") or ""


def test_a_server_that_ends_says_so(rig: Rig, visit: Callable[..., Visit]) -> None:
    visited = open_dashboard(visit, rig.url)
    page, visited.expected = visited.page, REFUSED
    rig.engine.stuck_seconds = 1.0
    try:
        expect(page.locator(".notice")).to_contain_text("An engine has failed")
        expect(page.get_by_text("does not answer")).to_be_visible()
        assert number(page, "Requests", 2) == "4"
    finally:
        rig.engine.stuck_seconds = 0.0
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()


def test_nobody_is_asked_while_it_is_paused_or_not_seen(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    page = open_dashboard(visit, rig.url).page
    asked = count_metrics(page)
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    stops: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (
            lambda: page.get_by_role("button", name="Pause").click(),
            lambda: page.get_by_role("button", name="Resume").click(),
        ),
        (lambda: page.evaluate(hide, True), lambda: page.evaluate(hide, False)),
    ]
    for stop, go_on in stops:
        wait_for(lambda: page.wait_for_timeout(50) or asked)
        stop()
        before = len(asked)
        page.wait_for_timeout(1000)  # in which it would ask five times
        assert len(asked) == before
        with page.expect_request("**/metrics"):
            go_on()
        asked.clear()


def test_several_servers_behind_one_address_are_noticed(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    visited = open_dashboard(visit, rig.url)
    page = visited.page
    text = rig.client.get("/metrics").text
    older = re.sub(
        r"^process_start_time_seconds .*$", "process_start_time_seconds 1e9", text, flags=re.M
    )
    page.route("**/metrics", lambda route: route.fulfill(body=older, content_type="text/plain"))
    expect(page.get_by_text("Several servers answer at this address")).to_be_visible()
