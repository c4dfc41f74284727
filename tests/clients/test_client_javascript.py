"""Node's official client and a browser, on the fake engine, whose every character is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_server import CHAT, EMBED, REPLY, Rig
from tests.support.programs import node_modules, program, run, run_on_page

PAGE_SCRIPT = """
(async () => {
  const body = {model: %(model)s, messages: [{role: "user", content: "Hi"}], stream: true};
  const found = {};
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: {"Content-Type": "application/json"},
    body: JSON.stringify(body),
  });
  const raw = await response.text();
  found.type = response.headers.get("Content-Type");
  found.id = response.headers.get("X-Request-Id") !== null;
  const events = raw.split("\\n\\n").filter((block) => block.startsWith("data: {"));
  found.events = events.map((block) => JSON.parse(block.slice(6)).choices[0].delta.content ?? "");
  found.done = raw.endsWith("data: [DONE]\\n\\n");
  found.frames = await new Promise((resolve, reject) => {
    const ws = new WebSocket(`ws://${location.host}/v1/chat/completions`);
    const texts = [];
    ws.onopen = () => ws.send(JSON.stringify({type: "request", id: "a", body}));
    ws.onerror = reject;
    ws.onmessage = (event) => {
      const data = JSON.parse(event.data);
      if (data.request_id !== "a") reject(new Error(event.data));
      if (data.object === "done") return resolve(texts);
      texts.push(data.choices[0].delta.content ?? "");
    };
  });
  const refused = await fetch("/v1/models/none");
  found.refused = [refused.status, (await refused.json()).error.code];
  console.log("found " + JSON.stringify(found));
})();
"""


def test_the_official_client_for_node(rig: Rig) -> None:
    command = [program("node"), "openai.mjs", rig.url + "/v1", CHAT, EMBED]
    found: dict[str, Any] = json.loads(run(command, cwd=node_modules()))
    assert (found["models"], found["model"]) == ([CHAT, EMBED], CHAT)
    for name in ("chat", "streamed", "helper", "completion"):
        assert found[name] == REPLY, name
    assert found["finish"] == "stop"
    assert found["streamedTotal"] == found["total"] > found["logprobs"] > 0
    assert len(found["embeddings"]) == 2
    for decoded, floats in zip(found["embeddings"], found["floats"], strict=True):
        assert decoded == pytest.approx(floats, abs=1e-6)
    assert found["raw"] == [200, True, CHAT]
    kind = "invalid_request_error"
    assert found["notFound"] == ["NotFoundError", 404, "model_not_found", "model", kind]
    assert found["badRequest"] == ["BadRequestError", 400, None, "temperature", kind]


def test_a_browsers_fetch_and_websocket(rig: Rig, tmp_path: Path) -> None:
    script = PAGE_SCRIPT % {"model": json.dumps(CHAT)}
    printed = run_on_page(script, rig.url + "/health", "found ", tmp_path)
    found: dict[str, Any] = json.loads(printed[printed.index("found ") + 6 :])
    assert found["type"].startswith("text/event-stream")
    assert found["id"]
    assert found["done"]
    assert "".join(found["events"]) == "".join(found["frames"]) == REPLY
    assert found["refused"] == [404, "model_not_found"]
