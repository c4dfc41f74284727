"""What tests of the dashboard share: a page that asks five times a second, and what it shows."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, expect

from tests.support.fake_server import CHAT, Rig
from tests.support.waiting import until
from tests.web.browsing import PATIENCE_MS, Visit

PATH = "/dashboard?every=0.2"


def open_dashboard(visit: Callable[..., Visit], url: str, **options: Any) -> Visit:
    """The dashboard, once it shows figures."""
    visited = visit(url + PATH, **options)
    expect(visited.page.get_by_role("region", name="Output", exact=True)).to_be_visible()
    return visited


def tile(page: Page, title: str) -> Locator:
    return page.get_by_role("region", name=title, exact=True)


def number(page: Page, title: str, line: int = 0) -> str:
    """What a tile tells of one of its lines, as it is written."""
    return tile(page, title).locator("dd").nth(line).inner_text().strip()


def value(page: Page, title: str, line: int = 0) -> float:
    """The same as a number; -1 while it is not known."""
    return _number(number(page, title, line))


def values(page: Page, title: str) -> list[float]:
    """Those of all lines of a tile at one moment; figures move from one reading to the next."""
    return [_number(text) for text in tile(page, title).locator("dd").all_inner_texts()]


def _number(text: str) -> float:
    word = text.split()[0].replace(",", "").rstrip("%")
    return -1.0 if word == "\N{EN DASH}" else float(word)


def wait_for(what: Callable[[], object]) -> None:
    """Return once it is so."""
    until(what, PATIENCE_MS / 1000)


def metrics(rig: Rig) -> str:
    return rig.client.get("/metrics").text


@contextlib.contextmanager
def streams(rig: Rig, count: int, headers: dict[str, str] | None = None) -> Iterator[None]:
    """So many requests, which run on until the engine is released, and are read to their ends."""
    body = {"model": CHAT, "prompt": "abc", "max_tokens": 60, "stream": True}
    url = f"{rig.url}/v1/completions"

    def read() -> None:
        response = httpx.post(url, json=body, headers=headers, timeout=30)
        assert response.text.endswith("[DONE]\n\n"), response.text

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    rig.engine.wait_until(lambda engine: engine.num_running == count)
    try:
        yield
    finally:
        rig.engine.release()
        for thread in threads:
            thread.join()
