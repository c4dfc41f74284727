"""The examples of docs/tools.md, run against an engine that writes what a model would."""

import re
import sys
from collections.abc import Iterator

import pytest

from inferneo_jax import GenerationRequest
from tests.support.fake_server import CHAT, Rig, make_tokenizer, running
from tests.support.paths import ROOT
from tests.support.programs import run

PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TEMPLATE = (
    "{{ tools | tojson }}<tool_call>"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Tokyo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    tokenizer = make_tokenizer(template=TEMPLATE)

    def script(request: GenerationRequest) -> list[int]:
        asked = tokenizer.decode(request.prompt, skip_special_tokens=False)
        text = "It is clear in Tokyo." if "<|start|>tool" in asked else CALL
        return [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids]

    with running(tokenizer, context=4096) as rig:
        rig.engine.script = script
        yield rig


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("code", EXAMPLES, ids=["whole", "streamed"])
def test_an_example_runs(rig: Rig, code: str) -> None:
    assert "127.0.0.1:8000" in code
    code = re.sub(r"qwen2\.5-[\w.-]+", CHAT, code.replace("http://127.0.0.1:8000", rig.url))
    printed = run([sys.executable, "-W", "error", "-c", code])
    if "stream=True" in code:
        assert "get_weather" in printed
        assert '{"city": "Tokyo"}' in printed
    else:
        assert printed.splitlines() == [
            "calls get_weather {'city': 'Tokyo'}",
            "It is clear in Tokyo.",
        ]
