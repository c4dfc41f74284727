"""The environment that chat templates run in: no Python internals, and bounds on time and size.

A template is a program from somebody else's repository. Jinja's sandbox keeps it from reaching
Python; what is added here keeps it from taking forever or filling the memory. Whatever can make
much out of little is metered: loops, operators, the methods and filters that pad, repeat and fill.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor

from inferneo_jax.errors import TemplateError
from inferneo_jax.template_size import (
    MAX_CHARACTERS,
    formatted_size,
    joined_size,
    product_size,
    replaced_size,
    written_size,
)

MAX_MADE = 8 * MAX_CHARACTERS
"""Most characters and list entries that all the operations of one rendering may make together."""
MAX_ITERATIONS = 100_000
"""Most numbers that all the ranges of one rendering may run through together."""
MAX_SECONDS = 5.0
"""Longest time of one rendering."""

_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_GROWING = frozenset(
    {"center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"}
)


class _Meter:
    """What one rendering has taken."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._ranges = MAX_ITERATIONS
        self._made = MAX_MADE

    def tick(self) -> None:
        """Called in every loop and call.

        Raises:
            TemplateError: the time is over. Not one of Jinja's, which a filter may swallow.
        """
        if time.monotonic() > self._deadline:
            raise TemplateError(
                f"the chat template ran for more than {MAX_SECONDS:g} seconds; "
                "send shorter messages",
                "messages",
            )

    def count(self, numbers: range) -> range:
        """Account for a range."""
        self._ranges -= len(numbers)
        if self._ranges < 0:
            raise jinja2.exceptions.SecurityError(
                f"its loops run through more than {MAX_ITERATIONS} numbers"
            )
        return numbers

    def make(self, size: int) -> None:
        """Account for something of ``size`` characters or entries, before it is made."""
        self.tick()
        self._made -= size
        if size > MAX_CHARACTERS or self._made < 0:
            raise jinja2.exceptions.SecurityError(
                f"it makes a text or list longer than {MAX_CHARACTERS}, "
                f"or more than {MAX_MADE} in all"
            )


_running: ContextVar[_Meter] = ContextVar("_running")


@contextmanager
def metered() -> Iterator[None]:
    """One rendering."""
    token = _running.set(_Meter())
    try:
        yield
    finally:
        _running.reset(token)


def tick() -> str:
    """Spend the running rendering's time; as a statement it writes nothing."""
    _running.get().tick()
    return ""


def ranges(*bounds: int) -> range:
    """``range`` for templates."""
    return _running.get().count(range(*bounds))


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Run the operator unless its result would be huge."""
        make = _running.get().make
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not available in chat templates")
        if operator == "+":
            make(written_size(left) + written_size(right))
        elif operator == "%" and isinstance(left, str):
            make(formatted_size(left, right))
        elif operator == "*":
            make(product_size(left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls, unless it is a method that would make much."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in _GROWING:
            _check_method(owner, name, [*args, *kwargs.values()])
        tick()
        result = super().call(context, obj, *args, **kwargs)
        return self.weigh(result) if obj is dict else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` with bounded widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            pattern = value.__self__
            if _NESTED.search(pattern):
                raise jinja2.exceptions.SecurityError("it computes the width of a format")
            _running.get().make(formatted_size(pattern, [*args, kwargs]))
            return wrapped(*args, **kwargs)

        return checked

    def concatenate(self, *parts: Any) -> str:
        """The operator ``~``."""
        texts = [str(part) for part in parts]
        _running.get().make(sum(map(len, texts)))
        return "".join(texts)

    def weigh(self, value: Any) -> Any:
        """A list or mapping that the template has built, unless it would be huge written out."""
        _running.get().make(written_size(value))
        return value

    def tick(self) -> str:
        """Called at the beginning of every turn of a loop, and of every macro."""
        return tick()

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        kinds = (jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)
        node: Any
        for node in template.find_all(kinds):
            node.body.insert(0, jinja2.nodes.ExprStmt(_own("tick", [])).set_lineno(node.lineno))
        _Metered().visit(template)
        template.set_environment(self)
        return template


class _Metered(jinja2.visitor.NodeTransformer):
    """Sends what Jinja does not intercept through methods of :class:`Sandbox`."""

    def visit_List(  # noqa: N802  (these names are the base class's)
        self, node: jinja2.nodes.List | jinja2.nodes.Dict
    ) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _own("weigh", [node]).set_lineno(node.lineno)

    visit_Dict = visit_List  # noqa: N815

    def visit_Concat(  # noqa: N802
        self, node: jinja2.nodes.Concat
    ) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _own("concatenate", node.nodes).set_lineno(node.lineno)


def _own(name: str, arguments: list[jinja2.nodes.Expr]) -> jinja2.nodes.Call:
    """A call of the environment's method ``name``, whatever names the template defines."""
    method = jinja2.nodes.EnvironmentAttribute(name)
    return jinja2.nodes.Call(method, arguments, [], None, None)


def _check_method(text: str, name: str, arguments: list[Any]) -> None:
    """Account for a method of ``text`` before it is called."""
    first = arguments[0] if arguments else None
    size = 0
    match name:
        case "center" | "ljust" | "rjust" | "zfill":
            size = first if isinstance(first, int) else 0
        case "expandtabs":
            size = text.count("\t") * (first if isinstance(first, int) else 8)
        case "replace":
            new = arguments[1] if len(arguments) > 1 else ""
            size = replaced_size(text, first, new)
        case "translate":
            size = len(text) * max(1, written_size(first))
        case "join":
            size = joined_size(first, text)
    _running.get().make(max(size, len(text)))


def center(value: Any, width: int = 80) -> str:
    """The filter ``center``."""
    _running.get().make(width)
    return str(value).center(width)


def replace(value: Any, old: str, new: str, count: int = -1) -> str:
    """The filter ``replace``."""
    text, old, new = str(value), str(old), str(new)
    _running.get().make(replaced_size(text, old, new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_environment
def join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: Any = None
) -> str:
    """The filter ``join``."""
    parts = list(value)
    if attribute is not None:
        parts = [environment.getitem(part, attribute) for part in parts]
    _running.get().make(joined_size(parts, str(d)))
    return str(d).join(map(str, parts))


def format_old(value: Any, *args: Any, **kwargs: Any) -> str:
    """The filter ``format``: the operator ``%``."""
    _running.get().make(formatted_size(str(value), [*args, kwargs]))
    return str(value) % (kwargs or args)


def indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The filter ``indent``."""
    text = str(value)
    step = width if isinstance(width, int) else len(width)
    _running.get().make(len(text) + (text.count("\n") + 1) * step)
    return jinja2.filters.do_indent(text, width, first, blank)


def batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterable[list[Any]]:
    """The filter ``batch``."""
    _running.get().make(linecount)
    return jinja2.filters.do_batch(value, linecount, fill_with)


@jinja2.pass_environment
def total(
    environment: jinja2.Environment, iterable: Iterable[Any], attribute: Any = None, start: Any = 0
) -> Any:
    """The filter ``sum``, of numbers."""
    if not isinstance(start, int | float):
        raise jinja2.exceptions.SecurityError("it sums what are no numbers")
    values = iterable
    if attribute is not None:
        values = [environment.getitem(value, attribute) for value in iterable]
    return sum(values, start)


def install(environment: Sandbox) -> None:
    """Replace the filters that can make much out of little, and drop those nobody needs."""
    environment.filters |= {
        "center": center,
        "replace": replace,
        "join": join,
        "format": format_old,
        "indent": indent,
        "batch": batch,
        "sum": total,
    }
    for name in ("pprint", "slice", "urlize", "wordwrap", "xmlattr"):
        del environment.filters[name]
    del environment.globals["lipsum"]  # writes as much text as it is asked for
