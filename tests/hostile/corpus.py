"""Bodies that no client means well with; each names what it is."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

from tests.support.fake_server import CHAT, EMBED

HI = [{"role": "user", "content": "Hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": CHAT, "prompt": "Hi", "max_tokens": 3},
    "/v1/chat/completions": {"model": CHAT, "messages": HI, "max_tokens": 3},
    "/v1/embeddings": {"model": EMBED, "input": "Hi"},
    "/tokenize": {"model": CHAT, "prompt": "Hi"},
    "/detokenize": {"model": CHAT, "tokens": [1]},
}
"""A request that each endpoint answers."""
LARGE = 3_900_000  # bytes: just below what is refused unread
MEGABYTE = "x" * 2**20


def raw_bodies(path: str) -> Iterator[tuple[str, bytes]]:
    """Bodies that are wrong as bytes, or before anyone looks at a field."""
    good = json.dumps(GOOD[path])
    yield "empty", b""
    yield "nested lists", b"[" * 100_000
    yield "nested and closed", b"[" * 100_000 + b"]" * 100_000
    yield "nested objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "nested in a field", b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "integer of 100,000 digits", b'{"model":' + b"9" * 100_000 + b"}"
    yield "exponent", b'{"model": 1e999999999}'
    yield "NaN", b'{"model": NaN}'
    yield "Infinity", b'{"model": -Infinity}'
    yield "UTF-16", good.encode("utf-16")
    yield "UTF-32", good.encode("utf-32")
    yield "Latin-1", '{"model": "é"}'.encode("latin-1")
    yield "overlong UTF-8", b'{"model": "\xc0\x80"}'
    yield "encoded surrogate", b'{"model": "\xed\xa0\x80"}'
    yield "byte order mark", b"\xef\xbb\xbf" + good.encode()
    yield "raw control characters", b'{"model": "\x00\x07\x1b[2J"}'
    yield "an array", f"[{good}]".encode()
    yield "two objects", (good + good).encode()
    yield "cut off", good[:-1].encode()
    yield "empty lists by the million", b'{"a":[' + b"[]," * (LARGE // 3) + b"[]]}"
    yield "objects by the million", b'{"a":[' + b'{"a":1},' * (LARGE // 8) + b"{}]}"
    names = b",".join(b'"%x":1' % i for i in range(LARGE // 11))
    yield "names by the hundred thousand", b"{" + names + b"}"
    yield "quotes", b'"' * LARGE
    yield "escaped quotes and brackets", b'"' + b'\\"[' * (LARGE // 3)


def fields(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields that are wrong beside others that are right."""
    yield "long model", {"model": MEGABYTE}
    yield "model of control characters", {"model": "\x00\x1b[2J\r\nX: y"}
    yield "list for model", {"model": [[]] * 1000}
    if path == "/v1/embeddings":
        yield from _prompts("input")
        yield "dimensions", {"dimensions": 2**63}
        yield "bool dimensions", {"dimensions": True}
        yield "long format", {"encoding_format": MEGABYTE}
        yield "long user", {"user": MEGABYTE}
        yield "truncation", {"truncate_prompt_tokens": -(2**62)}
    elif path == "/tokenize":
        yield "list for prompt", {"prompt": ["a"] * 100_000}
    elif path == "/detokenize":
        for name, wrong in _ids():
            yield name, {"tokens": wrong}
    else:
        yield from _sampling()
    if path == "/v1/completions":
        yield from _prompts("prompt")
    elif path == "/v1/chat/completions":
        yield from _conversations()


def _ids() -> Iterator[tuple[str, Any]]:
    yield "negative id", [-1]
    yield "huge id", [2**63]
    yield "bool id", [True]
    yield "float id", [1.0]


def _prompts(field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, wrong in _ids():
        yield f"{name} in {field}", {field: wrong}
    yield f"a million ids in {field}", {field: [1] * 10**6}
    yield f"100,000 of {field}", {field: ["a"] * 100_000}
    yield f"lists of {field}", {field: [[1]] * 50_000}
    yield f"long {field}", {field: MEGABYTE * 3}
    yield f"deep {field}", {field: _deep(900)}
    yield f"object as {field}", {field: {"a": 1}}


def _sampling() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "stops", {"stop": ["a"] * 100_000}
    yield "biases", {"logit_bias": {str(i): 1 for i in range(99_000)}}
    yield "long bias", {"logit_bias": {"9" * 2**20: 1}}
    yield "biased by a list", {"logit_bias": {"1": _deep(900)}}
    yield "stop ids", {"stop_token_ids": ["a"] * 500_000}
    yield "many stop ids", {"stop_token_ids": [1] * 500_000}
    yield "long user", {"user": MEGABYTE}
    yield "long salt", {"cache_salt": MEGABYTE}
    yield "long tier", {"service_tier": MEGABYTE}
    yield "string for a number", {"temperature": MEGABYTE}
    yield "deep number", {"temperature": _deep(900)}
    yield "deep options", {"stream": True, "stream_options": _deep(900)}
    for name in ("max_tokens", "n", "seed", "top_k", "min_tokens", "priority"):
        for value in (2**64, -(2**63), 1e300, True, "1", [1]):
            if (name, value) != ("seed", -(2**63)):
                yield f"{name} {value!r}", {name: value}


def _conversations() -> Iterator[tuple[str, dict[str, Any]]]:
    message = {"role": "user", "content": ""}
    yield "20,000 messages", {"messages": [message] * 20_000}
    yield "100,000 messages", {"messages": [message] * 100_000}
    yield "long role", {"messages": [{"role": MEGABYTE, "content": ""}]}
    yield "long content", {"messages": [{"role": "user", "content": MEGABYTE * 3}]}
    yield "deep role", {"messages": [{"role": _deep(900), "content": ""}]}
    part = {"type": _deep(900)}
    yield "deep part", {"messages": [{"role": "user", "content": [part]}]}
    long = {"type": MEGABYTE}
    yield "long part", {"messages": [{"role": "user", "content": [long]}]}
    yield "message as text", {"messages": MEGABYTE}
    yield "deep message", {"messages": _deep(900)}


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


SQUEEZED = gzip.compress(b"[" * 10_000_000)
