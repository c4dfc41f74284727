"""How well a running server and llama.cpp predict the same text with the same GGUF.

    inferneo serve model.gguf &
    python -m tests.tools.compare_likelihood model.gguf text.txt --llama ./llama-perplexity

Prints the mean negative log-likelihood of the same tokens, in nats, by both, and the difference.
The text is cut into windows of 512 tokens, of which the second halves are scored, as
llama-perplexity does it.
"""

import argparse
import json
import math
import re
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 512
SCORED = slice(WINDOW // 2 + 1, WINDOW)
"""The first token of the second half is only read."""
AT_ONCE = 4


class Server:
    """A running server of one model."""

    def __init__(self, url: str) -> None:
        self._url = url
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            self._model = json.load(answer)["data"][0]["id"]

    def ask(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        content = json.dumps({"model": self._model, **body}).encode()
        request = urllib.request.Request(
            self._url + path, content, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text, after that which begins every text if ``special``."""
        found = self.ask("/tokenize", prompt=text, add_special_tokens=special)["tokens"]
        return [int(token) for token in found]


def windows(server: Server, text: str, tokens: int) -> list[list[int]]:
    """The windows of a text in which ``tokens`` tokens are scored."""
    ids, plain = server.tokens(text, special=True), server.tokens(text, special=False)
    begin = ids[: len(ids) - len(plain)]
    count = -(-tokens // (SCORED.stop - SCORED.start))
    if len(ids) < count * WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens; {count * WINDOW} are needed")
    found = [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    # As in training, each window begins like a text, if texts begin with a token of their own.
    return [[*begin, *each[len(begin) :]] for each in found]


def ours(server: Server, prompts: list[list[int]]) -> float:
    """The mean by the server."""
    scores: list[float] = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        answer = server.ask("/v1/completions", prompt=some, max_tokens=0, echo=True, logprobs=0)
        for choice in answer["choices"]:
            scores += choice["logprobs"]["token_logprobs"][SCORED]
    return -float(np.mean(scores))


def theirs(llama: Path, model: Path, text: Path, count: int, threads: int) -> float:
    """The mean by llama-perplexity."""
    command = [llama, "-m", model, "-f", text, "-c", WINDOW, "--chunks", count, "-t", threads]
    command.append("--no-repack")  # its AMX kernels crash where the system does not permit tiles
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    (perplexity,) = re.findall(r"Final estimate: PPL = ([\d.]+)", found.stdout + found.stderr)
    return math.log(float(perplexity))


def main() -> None:
    """Print both means and their difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="the program llama-perplexity")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokens", type=int, default=20_000, help="to be scored")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    options = parser.parse_args()
    server = Server(options.url)
    prompts = windows(server, options.text.read_text(encoding="utf-8"), options.tokens)
    mine = ours(server, prompts)
    print(f"ours       {mine:.5f}", flush=True)
    other = theirs(options.llama, options.model, options.text, len(prompts), options.threads)
    print(f"llama.cpp  {other:.5f}")
    print(
        f"difference {mine - other:+.5f} over {len(prompts) * (SCORED.stop - SCORED.start)} tokens"
    )


if __name__ == "__main__":
    main()
