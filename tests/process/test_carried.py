"""The tool that measures what the host side carries still measures it, in one process and two."""

from pathlib import Path

import pytest

from tests.support.tiny_checkpoints import CHAT, tiny_checkpoints
from tests.tools.carried import measure, served


@pytest.mark.parametrize("processes", [1, 2])
def test_every_stream_gets_its_tokens(processes: int, tmp_path: Path) -> None:
    tiny_checkpoints(tmp_path)
    with served(processes, 2000.0, tmp_path / CHAT, tmp_path) as child:
        found = measure(child, streams=8, tokens=50)
    assert found.tokens > 0
    assert 0.1 < found.events <= 1.5  # the last event of a stream has no token
    assert "Traceback" not in child.log
