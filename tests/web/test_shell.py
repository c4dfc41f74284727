"""What all pages have: files from this server alone, a policy, two themes, a key."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from playwright.sync_api import expect

from server.web.pages import HEADERS
from tests.support.fake_server import Rig
from tests.web.browsing import Visit

PAGES = ["/", "/dashboard", "/docs"]


class Links(HTMLParser):
    """Whatever a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := values.get(name))]
        self.inline |= tag == "style" or (tag == "script" and "src" not in values)
        self.inline |= any(name == "style" or name.startswith("on") for name in values)


@pytest.mark.parametrize("path", [*PAGES, "/pages/chat.js"])
def test_every_file_has_the_policy(rig: Rig, path: str) -> None:
    headers = rig.client.get(path).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
    written = headers["Content-Security-Policy"]
    assert "unsafe" not in written
    assert "http" not in written
    policy = dict(part.split(" ", 1) for part in written.split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_nothing_from_elsewhere(rig: Rig, path: str) -> None:
    page = rig.client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    parser = Links()
    parser.feed(page.text)
    assert len(parser.links) >= 3
    assert not parser.inline
    for link in parser.links:
        assert ":" not in link
        assert not link.startswith("/")  # so that it works behind a prefix too
        response = rig.client.get(f"/{link}")
        assert response.status_code == 200
        assert response.content


@pytest.mark.parametrize("path", ["/", "/pages/base.css"])
def test_a_file_that_the_browser_has_is_not_sent_again(rig: Rig, path: str) -> None:
    first = rig.client.get(path)
    again = rig.client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("name", ["chat.html", "none.js", "..%2Fapp.py", "%2E%2E%2Fapp.py", "base"])
def test_no_other_file_is_served(rig: Rig, name: str) -> None:
    assert rig.client.get(f"/pages/{name}").status_code == 404


def test_the_theme_is_the_systems_until_another_is_chosen(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    page = visit(rig.url, dark=True).page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Switch to light colours").click()
    assert page.evaluate(ground) != dark
    page.reload()
    expect(page.get_by_role("button", name=re.compile("dark colours"))).to_be_visible()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


def test_the_description_is_asked_for_with_the_key_that_the_pages_keep(
    rig: Rig, visit: Callable[..., Visit]
) -> None:
    page = visit(rig.url).page
    page.evaluate("sessionStorage.setItem('inferneo.key', 'mine')")
    with page.expect_request("**/openapi.json") as asked:
        page.goto(f"{rig.url}/docs")
    assert asked.value.headers["authorization"] == "Bearer mine"
