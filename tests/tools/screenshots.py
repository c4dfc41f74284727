"""Take the screenshots of the chat page and the dashboard for the documentation.

``python -m tests.tools.screenshots docs/images``, from the root of the checkout; it needs Chromium
and the models of the catalog, and takes a few minutes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from inferneo_jax.weights.catalog import default_checkpoints_dir
from tests.support.paths import ROOT
from tests.support.server_process import process
from tests.web.browsing import Visit, chromium, visiting
from tests.web.chatting import Chat

QUESTION = "What is the capital of France, and what is it known for?"
TIPS = "Write three short tips for a good night's sleep."
CODE = "Write a Python function that adds two numbers."
LARGEST_BYTES = 200_000
LOADS = (2, 8, 16, 4)
"""Numbers of clients, one after the other."""


def chat_page(url: str, visit: Callable[..., Visit], folder: Path) -> None:
    """A conversation, and the probabilities of an answer's tokens."""
    chat = Chat(visit(url))
    chat.be_greedy()
    page = chat.page
    chat.ask(TIPS)
    chat.ask(CODE)
    page.locator("#thread").evaluate("element => { element.scrollTop = 0; }")
    page.screenshot(path=folder / "chat.png")
    chat.button("New chat").click()
    chat.button("Probabilities").click()
    chat.ask(QUESTION)
    page.locator(".tokens .token:is(.p0, .p1)").first.hover()
    page.screenshot(path=folder / "chat-probabilities.png")


def dashboard(url: str, visit: Callable[..., Visit], folder: Path) -> None:
    """The dashboard after a minute of changing load."""
    visited = visit(f"{url}/dashboard?every=1", viewport={"width": 1440, "height": 900})
    page = visited.page
    page.get_by_label("Show", exact=True).select_option("1 min")
    for clients in LOADS:
        command = [sys.executable, "-m", "server.cli", "bench", "serve", "--url", url]
        options = ["--concurrency", str(clients), "--requests", str(3 * clients + 10)]
        bench = [*command, *options, "--seed", str(clients)]
        with subprocess.Popen(bench, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
            while running.poll() is None:
                page.wait_for_timeout(200)  # in which the page is at work
        assert running.returncode == 0
    path = folder / "dashboard.png"
    page.screenshot(path=path)
    page.close()
    assert path.stat().st_size < LARGEST_BYTES, f"{path} is too large"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="takes the pictures")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    checkpoints = os.environ.get("INFERNEO_CHECKPOINTS") or str(default_checkpoints_dir())
    settings = {"INFERNEO_CHECKPOINTS": checkpoints, "INFERNEO_SLOTS": "16"}
    with tempfile.TemporaryDirectory() as made, chromium() as browser:
        settings["INFERNEO_KEYS_DB"] = str(Path(made) / "keys.db")
        with process(Path(made) / "log", settings) as server, visiting(browser) as visit:
            server.wait_ready()
            chat_page(server.url, visit, folder)
            dashboard(server.url, visit, folder)


if __name__ == "__main__":
    main()
