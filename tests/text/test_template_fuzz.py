"""Hostile templates by the thousand: whatever they are made of, they stay within their limits."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import getpagesize
from threading import Event, Thread

import jinja2.defaults
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from inferneo_jax.errors import TemplateError, TokenizerError
from inferneo_jax.text import template_pool
from inferneo_jax.text.chat_template import ChatTemplate
from inferneo_jax.text.template_protocol import MAX_CHARACTERS, MAX_ERROR_CHARACTERS, MEMORY_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other kernels bound time only")

TEMPLATES = int(os.environ.get("FUZZ_TEMPLATES", "300"))
"""How many are rendered; the same ones each time."""
BATCH = 10
SECONDS = 0.05
"""CPU time of a request here; what is bounded ends the same way after 5 s, only later."""
AT_START_BYTES = 40 << 20
PARENT_GROWTH_BYTES = 200 << 20
"""Two of the longest answers at once, as bytes and as texts of four bytes a character."""

HUNGRY = "{{ ('x' * 150000000) | length }}"
BUSY = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
"""These come near the limits whatever is drawn, so that they are seen to be looked at."""

MESSAGES = [
    {"role": "user", "content": "Hello <b>world</b> " * 50},
    {"role": "assistant", "content": "x", "n": 3, "deep": [[[["y"]]]], "map": {"a": 1}},
]
INTERNALS = [
    "__class__", "__mro__", "__base__", "__subclasses__", "__init__", "__globals__", "__builtins__",
    "__dict__", "__call__", "__self__", "__func__", "__code__", "__closure__", "__getattribute__",
    "__reduce_ex__", "__module__", "__import__", "__html__", "__format__", "__doc__", "mro",
    "gi_frame", "gi_code", "f_back", "f_globals", "tb_frame", "cr_frame", "ag_frame",
    "im_self", "environment", "_Namespace__attrs", "_TemplateReference__context", "_environment",
    "format_map", "format",
]  # fmt: skip
FILTERS = sorted({*jinja2.defaults.DEFAULT_FILTERS, "tojson"})
TESTS = sorted(filter(str.isidentifier, jinja2.defaults.DEFAULT_TESTS))
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">=", "in", "not in", "and", "or"]
KEYWORDS = [
    "width", "indent", "separators", "attribute", "start", "d", "default", "count", "n", "length",
    "fill_with", "precision", "method", "base", "sort_keys", "reverse", "case_sensitive", "by",
    "ensure_ascii", "first", "blank", "wrapstring", "trim_url_limit", "html", "min", "max", "sep",
    "maxsplit", "tabsize", "byteorder", "signed", "end", "leeway", "break_long_words",
]  # fmt: skip


INTEGERS = ["0", "1", "-1", "2", "7", "255", "9999", "99999", "1000000", "20000000", "2000000000"]
INTEGERS += ["99999999999", "10**18", "10**400", "9**999999", "-2147483648", "true"]
WORDS = [
    "",
    "a",
    "\n",
    "\t",
    "{",
    "{0}",
    "%s",
    "%999999999d",
    "%*d",
    "<",
    "{:>999999999}",
    "{0:{1}}",
]
WORDS += ["{0.__class__}", "{0[__init__]}", "é", "👩", "big", "ceil", "idna", "utf-16", "a@b.c"]
WORDS += ["http://", "&lt;", "%255d", "role", "content", "__class__", "deep.0.0"]
# What methods take: i an integer, t a text (of bytes for bytes), s something to iterate over, a
# anything; all others are called with whatever comes.
TAKEN = {
    "i": "zfill expandtabs splitlines bit_length insert pop hex",
    "it": "center ljust rjust to_bytes",
    "t": "count find index rfind rindex startswith endswith strip lstrip rstrip partition encode "
    "removeprefix removesuffix split rsplit fromhex",
    "ti": "split rsplit",
    "tt": "replace maketrans",
    "tti": "replace",
    "s": "join extend fromkeys format_map translate update from_bytes",
    "aa": "format get setdefault",
    "": "title upper lower swapcase capitalize casefold items keys values copy as_integer_ratio",
}
SIGNATURES: dict[str, list[str]] = {}
for _kinds, _names in TAKEN.items():
    for _name in _names.split():
        SIGNATURES.setdefault(_name, []).append(_kinds)


def written(form: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(form.format, *parts)


@st.composite
def called(draw, kind: type, receivers: st.SearchStrategy[str]) -> str:
    """A method of a value, called with what it takes or with whatever comes."""
    name = draw(st.sampled_from([name for name in dir(kind) if not name.startswith("_")]))
    if name in SIGNATURES and draw(st.integers(0, 9)):
        own = octets if kind is bytes else texts
        parts = {"i": integers, "t": own, "s": collections, "a": anything}
        given = ", ".join(draw(parts[each]) for each in draw(st.sampled_from(SIGNATURES[name])))
    else:
        given = draw(arguments)
    return f"({draw(receivers)}).{name}({given})"


integers = st.sampled_from(INTEGERS)
# What is made of variables is not folded while the template is compiled.
words = st.sampled_from([repr(word) for word in WORDS]) | st.sampled_from(
    [f"word[{n}]" for n in range(len(WORDS))] + ["messages[0].content", "lipsum(n=1)"]
)
grown = written("({} * {})", words, st.sampled_from(["999", "100000", "7000000", "10**10"]))
simple = st.one_of(integers, words, grown, st.sampled_from(["messages", "range(9999)|list", "{}"]))
internals = st.sampled_from(INTERNALS)
filters = st.sampled_from(FILTERS)

texts: st.SearchStrategy[str] = st.deferred(
    lambda: words | grown | called(str, texts) | written("({} ~ {})", texts, simple)
)
octets: st.SearchStrategy[str] = st.deferred(
    lambda: (
        written("({}).encode()", grown)
        | written("({} * {})", octets, integers)
        | called(bytes, octets)
    )
)
numbers: st.SearchStrategy[str] = st.deferred(
    lambda: (
        integers
        | st.sampled_from(["1.5", "1e308", "-0.0"])
        | called(int, written("({})", integers))
        | called(float, st.sampled_from(["1.5", "1e308"]))
        | written("({} {} {})", numbers, st.sampled_from(OPERATORS[:7]), numbers)
    )
)
collections: st.SearchStrategy[str] = st.deferred(
    lambda: (
        st.sampled_from(["messages", "(range(99999) | list)", "[]", "{}", "messages[1].deep"])
        | written("range({})", integers)
        | written("[{}, {}]", anything, simple)
        | written("({}, {})", anything, simple)
        | written("{{'a': {}, {}: 1}}", anything, words)
        | written("({} * {})", collections, integers)
        | written("dict(a={}, b={})", anything, simple)
        | st.one_of([called(kind, collections) for kind in (list, dict, tuple)])
    )
)
provided: st.SearchStrategy[str] = st.deferred(
    lambda: (
        st.sampled_from(["self", "namespace", "cycler", "joiner", "lipsum", "dict", "loop"])
        | written("strftime_now({})", texts)
        | written("lipsum({})", integers | arguments)
        | written("cycler({}).next()", arguments)
        | written("joiner({})()", simple)
        | written("namespace({})", arguments)
        | written("raise_exception({})", texts)
    )
)
anything: st.SearchStrategy[str] = st.deferred(
    lambda: simple | texts | octets | numbers | collections | provided | composed
)
arguments = st.lists(
    simple | st.deferred(lambda: anything) | written("{}={}", st.sampled_from(KEYWORDS), simple),
    max_size=3,
).map(lambda given: ", ".join(sorted(given, key=lambda each: bool(re.match(r"\w+=", each)))))
composed = st.one_of(
    written("({} | {}({}))", anything, filters, arguments),
    written("({} | {})", anything, filters),
    written("({} | {}({}))", grown | collections, filters, integers),
    written("({} | map('{}', {}) | list)", collections, filters, simple),
    written("({} {} {})", anything, st.sampled_from(OPERATORS), anything),
    written("({} is {}({}))", anything, st.sampled_from(TESTS), simple),
    written("({} if {} else {})", anything, simple, simple),
    written("({})[{}]", anything, simple),
    written("({})[{}:{}:{}]", anything, integers, integers, integers),
    written("({}).{}", anything, internals),
    written("({})['{}']", anything, internals),
    written("({} | attr('{}'))", anything, internals),
    written("({}).{}.{}({})", anything, internals, internals, arguments),
    written("'{{0.{}.{}}}'.format({})", internals, internals, anything),
    written("({} | map(attribute='{}') | list)", collections, internals),
)

SHAPES = [
    "{{{{ {0} }}}}",
    "{{% set x = {0} %}}{{{{ x }}}}{{{{ [x, x] | tojson(indent={1}) }}}}",
    "{{% for a in {0} %}}{{% for b in {1} %}}{{{{ b ~ a }}}}{{% endfor %}}{{% endfor %}}",
    "{{% set n = namespace(v={0}) %}}{{% for i in range(99999) %}}{{% set n.v = n.v + n.v %}}"
    "{{% endfor %}}{{{{ n.v }}}}",
    "{{% set n = namespace(v={0}) %}}{{% for i in range(99999) %}}{{% set n.v = [n.v, {1}] %}}"
    "{{% endfor %}}{{{{ n.v | string | length }}}}",
    "{{% macro m(a, b=1) %}}{{{{ a }}}}{{{{ m([a, a], {0}) }}}}{{% endmacro %}}{{{{ m({1}) }}}}",
    "{{% for a in [{0}] recursive %}}{{{{ loop([a, {1}]) }}}}{{% endfor %}}",
    "{{% filter replace('a', {0}) %}}{{{{ {1} }}}}{{% endfilter %}}",
    "{{% macro m(a) %}}{{{{ caller({0}) }}}}{{% endmacro %}}"
    "{{% call(b) m({1}) %}}{{{{ [b, b] }}}}{{% endcall %}}",
    "{{% if {0} %}}{{% set messages = {1} %}}{{% include messages %}}{{% endif %}}",
    "{{% generation %}}{{{{ {0} }}}}{{% endgeneration %}}{{% with x = {1} %}}{{{{ x }}}}"
    "{{% endwith %}}",
]
templates = st.builds(
    lambda shape, *parts: shape.format(*parts), st.sampled_from(SHAPES), anything, anything | simple
)

ALLOWED = re.compile(
    r"<(function (safe_range|generate_lorem_ipsum|_raise_exception|_strftime_now|Macro)"
    r"|class '(jinja2\.utils\.(Cycler|Joiner)|inferneo_jax\.text\.template_worker\._Namespace)'"
    r"|bound method (Cycler|Joiner|Undefined|LoopContext|_Dict|Namespace|_Namespace)\b"
    r"|built-in method)"
)
INTERNAL = re.compile(
    r"<(class|module|code|frame|slot|method|function|bound method|built-in)\b|__builtins__|"
    r"site-packages|/lib/python|subprocess|Popen"
)


def outcome(source: str) -> str:
    """What a template wrote, or the error."""
    try:
        return ChatTemplate(source, {"bos_token": "<s>"}).render(
            MESSAGES,
            add_generation_prompt=True,
            continue_final_message=False,
            variables={"word": WORDS},
        )
    except (TemplateError, TokenizerError) as error:
        said = str(error)
    assert len(said) < MAX_ERROR_CHARACTERS + 200
    return said


class Watch:
    """Looks at the workers every few milliseconds, as those that end cannot be asked any more."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.request_seconds = 0.0
        self._at_request: dict[int, float] = {}
        self._over = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def asked(self, pid: int) -> None:
        """Note that a worker gets a request now."""
        self._at_request[pid] = self._seconds(pid)

    def _seconds(self, pid: int) -> float:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def _run(self) -> None:
        while not self._over.wait(0.003):
            for pid, before in list(self._at_request.items()):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    spent = self._seconds(pid) - before
                except (FileNotFoundError, ProcessLookupError):
                    self._at_request.pop(pid, None)
                    continue
                if peak := re.search(r"VmPeak:\s+(\d+) kB", status):
                    self.peak_bytes = max(self.peak_bytes, int(peak[1]) << 10)
                self.request_seconds = max(self.request_seconds, spent)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


@pytest.fixture(scope="module")
def check():
    """Renders templates, two at a time, and checks what it took."""
    ask = template_pool._Worker.ask
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads, Watch() as watch:

        def watched(worker, *request):
            watch.asked(worker.pid)
            return ask(worker, *request)

        patch.setattr(template_pool._Worker, "ask", watched)
        patch.setattr("inferneo_jax.text.chat_template.MAX_SECONDS", SECONDS)
        outcome("")
        at_first = resident()

        def checked(sources: list[str]) -> None:
            for text in threads.map(outcome, sources):
                assert len(text) <= MAX_CHARACTERS
                assert not INTERNAL.search(ALLOWED.sub("", text))
            assert watch.peak_bytes <= AT_START_BYTES + MEMORY_BYTES
            assert watch.request_seconds <= SECONDS + 0.1, "the clock that counts it has ticks"
            assert resident() - at_first < PARENT_GROWTH_BYTES

        yield checked
        assert watch.peak_bytes > MEMORY_BYTES // 2, "HUNGRY was not seen"
        assert watch.request_seconds > SECONDS / 2


@settings(
    max_examples=TEMPLATES // BATCH,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(sources=st.lists(templates, min_size=BATCH, max_size=BATCH))
@example(sources=[HUNGRY, BUSY])
def test_no_hostile_template_leaves_its_limits(check, sources):
    check(sources)
