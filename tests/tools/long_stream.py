"""A stream of ten minutes ends with ``[DONE]``: ``python -m tests.tools.long_stream``.

The tiny model is read at a steady pace, which pauses its generation whenever it is ahead.
``--minutes`` sets another length.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import httpx

from tests.support.raw_http import event_of
from tests.support.server_process import Process, process
from tests.support.tiny_checkpoints import CHAT, tiny_checkpoints

TOKENS = 30_000
DONE = "data: [DONE]"


async def paced(server: Process, seconds: float) -> dict[str, object]:
    """Read a long stream evenly over so many seconds."""
    asked = {"model": CHAT, "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True}
    asked |= {"stream": True, "logprobs": 5, "stream_options": {"include_usage": True}}
    started, events, tokens, last, usage = time.monotonic(), 0, 0, "", ""
    async with (
        httpx.AsyncClient(timeout=None) as client,
        client.stream("POST", server.url + "/v1/completions", json=asked) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                usage, last = last, line
                events += 1
                for choice in (event_of(line) or {"choices": ()})["choices"]:
                    tokens += len((choice["logprobs"] or {"tokens": ()})["tokens"])
                due = started + seconds * tokens / TOKENS
                if (early := due - time.monotonic()) > 0.05:
                    await asyncio.sleep(early)
    took = time.monotonic() - started
    assert event_of(usage)["usage"]["completion_tokens"] == tokens
    return {"seconds": round(took, 1), "events": events, "tokens": tokens, "last": last}


def main() -> None:
    """Run it and say how it ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.2)
    seconds = parser.parse_args().minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        settings = tiny_checkpoints(Path(folder))
        with process(Path(folder) / "log", settings) as server:
            server.wait_ready()
            found = asyncio.run(paced(server, seconds))
    print(found)
    assert found["last"] == DONE
    assert found["tokens"] == TOKENS
    assert float(str(found["seconds"])) >= 0.95 * seconds


if __name__ == "__main__":
    main()
