"""What tests of the web pages share: a browser whose every complaint fails the test."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.support.programs import node_modules, program

PATIENCE_MS = 60_000
SHOTS = "INFERNEO_TEST_SCREENSHOTS"
"""Names a folder where screenshots are kept, to be looked at."""

_FLAGS = [
    "--no-sandbox",  # it would need rights that a container does not give
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium without a window."""
    executable = program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=executable, args=_FLAGS)
        yield found
        found.close()


class Visit:
    """A page in a browser profile of its own.

    Attributes:
        page: Playwright's.
        expected: parts of complaints that this test is about, such as the status of a refusal.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.expected: list[str] = []
        self.complaints: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location}")

    def unexpected(self) -> list[str]:
        """What the browser complained of, beside what the test is about."""
        return [each for each in self.complaints if not any(part in each for part in self.expected)]

    def shot(self, name: str) -> None:
        """Keep a screenshot, where somebody wants to look at it."""
        if folder := os.environ.get(SHOTS):
            self.page.screenshot(path=Path(folder) / f"{name}.png")

    def assert_accessible(self) -> None:
        """The page as it is now has none of the faults that axe finds.

        See https://www.deque.com/axe/core-documentation/api-documentation/.
        """
        script = node_modules() / "node_modules" / "axe-core" / "axe.min.js"
        if not self.page.evaluate("'axe' in window"):
            # Evaluated by the debugger, which the page's policy does not bind.
            self.page.evaluate(script.read_text(encoding="utf-8"))
        found: dict[str, Any] = self.page.evaluate("axe.run()")
        faults = [
            (fault["id"], fault["help"], [node["html"][:200] for node in fault["nodes"]])
            for fault in found["violations"]
        ]
        assert faults == []
        assert found["passes"]


def use_key(visited: Visit, text: str) -> None:
    """Give the key dialog, which is open, a key."""
    dialog = visited.page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill(text)
    dialog.get_by_role("button", name="Use this key").click()


@contextlib.contextmanager
def visiting(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens an address in a new profile; what the browser complains of is an error at the end."""
    visits: list[Visit] = []

    def go(url: str, *, dark: bool = False, **options: Any) -> Visit:
        context = browser.new_context(
            color_scheme="dark" if dark else "light",
            viewport=options.pop("viewport", {"width": 1280, "height": 800}),
            reduced_motion="reduce",
            **options,
        )
        context.set_default_timeout(PATIENCE_MS)
        visits.append(Visit(context.new_page()))
        visits[-1].page.goto(url)
        return visits[-1]

    expect.set_options(timeout=PATIENCE_MS)
    yield go
    for each in visits:
        each.page.context.close()
    for each in visits:
        assert each.unexpected() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """It ends with its file: while it lives a loop runs here, and no other test may run one."""
    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens an address in a new profile; what the browser complains of fails the test."""
    with visiting(browser) as go:
        yield go
