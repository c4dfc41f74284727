"""The process that compiles and renders chat templates in Hugging Face's dialect of Jinja.

Templates come from model repositories and are not trusted. Jinja's sandbox keeps them away from
Python's internals, but nothing in Python limits the resources of a single call. They therefore run
in this process, whose memory, CPU time and files the kernel limits before it reads its first
request. It imports only the standard library, jinja2 and the constants of the protocol, and takes
20 MB of memory.
"""

import encodings.unicode_escape  # noqa: F401  (templates need the modules unused here)
import html  # noqa: F401
import json
import os
import pprint  # noqa: F401
import resource
import signal
import sys
import textwrap  # noqa: F401
import unicodedata  # noqa: F401
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from inferneo_jax.text.template_protocol import (
    ANSWER,
    FAILED,
    MAX_CHARACTERS,
    MAX_ERROR_CHARACTERS,
    MEMORY,
    MEMORY_BYTES,
    READY,
    REFUSED,
    REQUEST,
    SYNTAX,
    TEXT,
    TOO_DEEP,
    TOO_LONG,
)
from inferneo_jax.text.template_syscalls import leave_few_system_calls

_CACHED_TEMPLATES = 8
_GROWTH_BYTES = 16 << 20
"""A worker that has grown by more than this after an answer is replaced."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks the assistant's words for training and opens a scope."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Keep the body of the block and drop its tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Dict:
    """``dict`` for templates, without access to the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` for templates, which rejects attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter is named, so that ``self`` can be a keyword argument.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot have {name!r}; rename it so that it begins with no underscore"
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson``, without Jinja's escaping for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> jinja2.Environment:
    """The environment of transformers, for which model authors write their templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


_ENVIRONMENT = _environment()


class _TooLongError(Exception):
    """The template wrote more text than MAX_CHARACTERS."""


@lru_cache(_CACHED_TEMPLATES)
def _compiled(source: bytes) -> jinja2.Template:
    return _ENVIRONMENT.from_string(source.decode("utf-8", "surrogatepass"))


def _variables(source: bytes) -> str:
    """The names that a template reads and the environment does not define, one per line."""
    _compiled(source)
    tree = _ENVIRONMENT.parse(source.decode("utf-8", "surrogatepass"))
    read = jinja2.meta.find_undeclared_variables(tree)
    return "\n".join(sorted(read - _ENVIRONMENT.globals.keys()))


def _rendered(source: bytes, context: Mapping[str, Any]) -> str:
    parts: list[str] = []
    size = 0
    for part in _compiled(source).generate(context):
        size += len(part)
        if size > MAX_CHARACTERS:
            raise _TooLongError
        parts.append(part)
    return "".join(parts)


def _answered(source: bytes, context: bytes) -> tuple[bytes, str]:
    """Return the kind and the text of the answer to a request."""
    try:
        if not context:
            return TEXT, _variables(source)
        return TEXT, _rendered(source, json.loads(context))
    except _TooLongError:
        return TOO_LONG, ""
    except MemoryError:
        return MEMORY, ""
    except RecursionError:
        return TOO_DEEP, ""
    except jinja2.TemplateSyntaxError as error:
        return SYNTAX, f"line {error.lineno}: {error.message}"[:MAX_ERROR_CHARACTERS]
    except jinja2.TemplateError as error:
        return REFUSED, str(error.message)[:MAX_ERROR_CHARACTERS]
    except (ImportError, OSError):
        return FAILED, "it uses a file or a module, which templates cannot"
    except Exception as error:  # noqa: BLE001  (a template can make Python raise anything)
        return FAILED, (str(error) or type(error).__name__)[:MAX_ERROR_CHARACTERS]


def _answer(source: bytes, context: bytes) -> tuple[bytes, bytes]:
    try:
        kind, text = _answered(source, context)
        return kind, text.encode("utf-8", "surrogatepass")
    except MemoryError:  # while encoding the text or the error's description
        return MEMORY, b""


class _Memory:
    """Measures this process's memory; opens its file early, because that is impossible later."""

    def __init__(self) -> None:
        # Other systems do not limit the address space either; only time is bounded there.
        linux = sys.platform == "linux"
        self._file = os.open("/proc/self/statm", os.O_RDONLY) if linux else None
        self.address_space = self._read(0)
        self._resident = self._read(1)

    def _read(self, field: int) -> int:
        if self._file is None:
            return 0
        pages = os.pread(self._file, 100, 0).split()[field]
        return int(pages) * resource.getpagesize()

    def has_grown(self) -> bool:
        return self._read(1) > self._resident + _GROWTH_BYTES


def _confine(memory: _Memory) -> None:
    """Have the kernel limit this process; undoing that would require privileges."""
    highest = os.open(os.devnull, os.O_RDONLY)
    os.close(highest)
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,
        # Nothing more can be opened: no file, no socket, and therefore no module.
        "RLIMIT_NOFILE": highest,
        "RLIMIT_NPROC": 0,
    }
    if memory.address_space:
        limits["RLIMIT_AS"] = memory.address_space + MEMORY_BYTES
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    # The default action of this signal ends a request that takes too long. It needs no help from
    # the interpreter, so it also ends a single call that never returns to it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    leave_few_system_calls()


def _send(channel: BinaryIO, kind: bytes, text: bytes, *, ends: bool) -> None:
    channel.write(ANSWER.pack(kind, ends, len(text)))
    channel.write(text)
    channel.flush()


def main() -> None:
    """Answer requests on the socket that is the standard input, until it is closed."""
    # The closed socket is the only sign that the parent has ended, which suffices because requests
    # are bounded in time. PR_SET_PDEATHSIG would kill this process when the thread that started it
    # ends.
    requests, answers = open(0, "rb"), open(0, "wb", closefd=False)  # noqa: SIM115
    memory = _Memory()
    _confine(memory)
    _send(answers, READY, b"", ends=False)
    ends = False
    while not ends and len(header := requests.read(REQUEST.size)) == REQUEST.size:
        seconds, source_size, context_size = REQUEST.unpack(header)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        source, context = requests.read(source_size), requests.read(context_size)
        kind, text = _answer(source, context)
        del source, context
        ends = kind == MEMORY or memory.has_grown()
        _send(answers, kind, text, ends=ends)
        signal.setitimer(signal.ITIMER_PROF, 0)
