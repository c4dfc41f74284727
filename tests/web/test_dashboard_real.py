"""The dashboard of a real server under load, of which the picture of docs/images is made."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.server_process import process
from tests.web.browsing import Visit

IMAGES = "INFERNEO_DOCS_IMAGES"
"""Names the folder that takes the picture; without it none is made."""
LARGEST_BYTES = 200_000
LOADS = ("2", "8", "16", "4")
"""Clients at once, one after the other."""

pytestmark = pytest.mark.real


@pytest.mark.skipif(IMAGES not in os.environ, reason=f"{IMAGES} names no folder")
def test_picture_of_the_dashboard(
    real_checkpoints: Path, tmp_path: Path, visit: Callable[..., Visit]
) -> None:
    settings = {"INFERNEO_CHECKPOINTS": str(real_checkpoints), "INFERNEO_SLOTS": "16"}
    settings["INFERNEO_KEYS_DB"] = str(tmp_path / "keys.db")
    with process(tmp_path / "log", settings) as server:
        server.wait_ready()
        visited = visit(f"{server.url}/dashboard?every=1", viewport={"width": 1440, "height": 900})
        page = visited.page
        page.get_by_label("Show", exact=True).select_option("1 min")
        for clients in LOADS:
            command = [
                sys.executable,
                "-m",
                "server.cli",
                "bench",
                "serve",
                "--url",
                server.url,
            ]
            options = ["--concurrency", clients, "--requests", str(3 * int(clients) + 10)]
            bench = [*command, *options, "--seed", clients]
            with subprocess.Popen(bench, cwd=ROOT, stdout=subprocess.DEVNULL) as running:
                while running.poll() is None:
                    page.wait_for_timeout(200)  # in which the page is at work
            assert running.returncode == 0
        path = Path(os.environ[IMAGES]) / "dashboard.png"
        path.parent.mkdir(exist_ok=True)
        page.screenshot(path=path)
        page.close()
    assert path.stat().st_size < LARGEST_BYTES
