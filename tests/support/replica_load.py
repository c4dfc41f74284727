"""Clients of two replicas, and how their requests ended."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

from server.keys.key import Limits
from tests.support.ray_cluster import Replicas

CLIENTS = 6
LIMIT = 12
LOG_SECONDS = 3.0
"""How long Ray takes to bring the replicas' logs."""


@dataclass
class Answer:
    """How a request ended; times in seconds of the monotonic clock."""

    id: str
    stream: bool
    began: float
    ended: float = 0.0
    outcome: str = ""

    @property
    def good(self) -> bool:
        return self.outcome == "answered"


class Load:
    """Clients that ask again and again; three of four are streamed."""

    def __init__(self, server: Replicas, model: str, headers: dict[str, str]) -> None:
        self.url = server.url + "/v1/completions"
        self.headers = headers
        self.body = {"model": model, "prompt": "Once upon a time", "temperature": 0}
        self.answers: list[Answer] = []

    async def ask(self, client: httpx.AsyncClient, tokens: int) -> Answer:
        """One request."""
        number = len(self.answers)
        stream = number % 4 != 0
        answer = Answer(f"load-{id(self):x}-{number}", stream, time.monotonic())
        self.answers.append(answer)
        body = self.body | {"max_tokens": tokens, "ignore_eos": True, "stream": stream}
        headers = self.headers | {"X-Request-Id": answer.id}
        status, text = 0, ""
        try:
            async with client.stream("POST", self.url, json=body, headers=headers) as response:
                status = response.status_code
                async for part in response.aiter_text():
                    text += part
            whole = text.rstrip().endswith("data: [DONE]") if stream else True
            told = "error" in text if status == 200 else status != 200
            answer.outcome = "answered" if whole and not told else _told(status, text)
        except httpx.TransportError as error:
            begun = f"{status}, then cut" if status else "no status"
            answer.outcome = f"{begun}: {type(error).__name__}"
        answer.ended = time.monotonic()
        return answer

    def by_pid(self, server: Replicas) -> Counter[int]:
        """How many of the answered requests each process answered."""
        good = {answer.id for answer in self.answers if answer.good}
        return Counter(pid for pid, facts in server.events("request") if facts.get("id") in good)


def _told(status: int, text: str) -> str:
    try:
        return f"{status} {json.loads(text)['error']['code']}"
    except (ValueError, KeyError):
        return f"{status} {text[:60]!r}"


async def share_limit(server: Replicas, model: str) -> dict[str, Any]:
    """A limit holds once, over both."""
    load = Load(server, model, server.key(Limits(requests=LIMIT, tokens=None, day_requests=None)))
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(3 * LIMIT // CLIENTS):
            await asyncio.gather(*(load.ask(client, 2) for _ in range(CLIENTS)))
    await asyncio.sleep(LOG_SECONDS)
    return {
        "requests_a_minute": LIMIT,
        "sent": len(load.answers),
        "outcomes": Counter(answer.outcome for answer in load.answers),
        "accepted_by_process": load.by_pid(server),
    }
