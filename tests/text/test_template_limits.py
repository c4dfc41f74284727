"""What no chat template can do: take memory or time, nest too deeply, or break a worker."""

import time
import tracemalloc
from pathlib import Path

import pytest

from inferneo_jax.errors import InferneoError, TemplateError, TokenizerError
from inferneo_jax.text.chat_template import ChatTemplate
from inferneo_jax.text.template_pool import POOL
from inferneo_jax.text.template_protocol import MAX_CHARACTERS, MEMORY_BYTES

HELLO = [{"role": "user", "content": "Hello!"}]
SECONDS = 0.5
AT_START_BYTES = 40 << 20
"""More than a worker takes before its first request."""
IN_PARENT_BYTES = 80 << 20
"""The longest answer twice, as bytes and as a text, and some more."""

MEMORY_ATTACKS = [
    "{{ 'a'.encode().ljust(2000000000) }}",
    "{{ (1).to_bytes(2000000000, 'big') }}",
    "{{ 'a'.encode() * 2000000000 }}",
    "{{ 'a'.encode().zfill(2000000000) }}",
    "{{ ('a' * 100000).encode().replace('a'.encode(), ('b' * 100000).encode()) }}",
    "{{ range(100000) | list | tojson(separators=['x' * 1000000, ':']) }}",
    "{{ strftime_now('%255d' * 400000) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 1000000000 * [1] }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' | format(1.5) }}",
    "{{ '%(a)s' * 900000 % {'a': 'x' * 1000000} }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ 'x' | indent(999999999, first=true) }}",
    "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "{{ ('y' * 100000) | join('x' * 100000) }}",
    "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "{{ [1] | batch(999999999, 'x') | list }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ (range(99999) | list * 100) | sort }}",
    "{{ ([[1] * 100000] * 100000) | sum(start=[]) }}",
    "{{ " + "1" * 1_000_000 + " }}",
    "{% set text = 'x' * 7000000 %}{{ text }}{{ text }}",
    "{{ raise_exception('x' * 100000000) }}",
]
TIME_ATTACKS = [
    "{{ 1.5 | round(20000000, 'ceil') }}",
    "{{ (9 ** 9999999) | string | length }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in messages * 99999 %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}",
    "{{ lipsum(n=1000000) | length }}",
    "{{ ('a ' * 3000000) | wordwrap(1) | length }}",
]
GROW = (
    "{% set ns = namespace(v=V) %}{% for i in range(99999) %}{% set ns.v = E %}{% endfor %}"
    "{{ ns.v }}"
)
GROWING_ATTACKS = [
    GROW.replace("V", value).replace("E", expression)
    for value, expression in [
        ("'x'", "ns.v + ns.v"),
        ("'x'", "ns.v ~ ns.v"),
        ("[1]", "ns.v + ns.v"),
        ("[1]", "[ns.v, ns.v]"),
        ("{}", "{'a': ns.v, 'b': ns.v}"),
        ("{}", "dict(a=ns.v, b=ns.v)"),
        ("99", "ns.v * ns.v"),
    ]
] + [
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% macro a(n) %}{{ a(n + 'x' * 99999) }}{% endmacro %}{{ a('') }}",
    "{% for n in [[[]]] recursive %}{{ loop([n]) }}{% endfor %}",
    "{{ ('{' ~ ':' * 40000).format() }}",
]
SAID = "256 MB of memory|8000000 characters|seconds|too many digits|refused: x"
DEEP = 3000
NESTED = {
    "parentheses": "{{ " + "(" * DEEP + "1" + ")" * DEEP + " }}",
    "lists": "{{ " + "[" * DEEP + "]" * DEEP + " }}",
    "mappings": "{{ " + "{1:" * DEEP + "1" + "}" * DEEP + " }}",
    "if": "{% if 1 %}" * DEEP + "{% endif %}" * DEEP,
    "100 if": "{% if 1 %}" * 100 + "{% endif %}" * 100,
    "for": "{% for a in [1] %}" * DEEP + "{% endfor %}" * DEEP,
    "25 for": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    "macro": "{% macro a() %}" * DEEP + "{% endmacro %}" * DEEP,
    "call": "{% call a() %}" * DEEP + "{% endcall %}" * DEEP,
    "filter": "{% filter e %}" * DEEP + "{% endfilter %}" * DEEP,
    "set": "{% set x %}" * DEEP + "{% endset %}" * DEEP,
    "generation": "{% generation %}" * DEEP + "{% endgeneration %}" * DEEP,
    "not": "{{ " + "not " * DEEP + "1 }}",
    "minus": "{{ " + "-" * DEEP + "1 }}",
    "plus": "{{ 1" + " + 1" * DEEP + " }}",
    "conditions": "{{ 1" + " if x else 1" * DEEP + " }}",
    "attributes": "{{ x" + ".a" * DEEP + " }}",
    "items": "{{ x" + "[1]" * DEEP + " }}",
    "calls": "{{ x" + "()" * DEEP + " }}",
    "filters": "{{ x" + " | e" * DEEP + " }}",
}


def render(source: str, **variables) -> str:
    return ChatTemplate(source, {}).render(
        HELLO, add_generation_prompt=True, continue_final_message=False, variables=variables
    )


def peak_bytes(pid: int) -> int:
    """The largest address space that a worker has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak"))


@pytest.fixture
def bounded(monkeypatch, machine):
    """Whatever happens in the test, neither this process nor a worker takes much."""
    monkeypatch.setattr("inferneo_jax.text.chat_template.MAX_SECONDS", SECONDS)
    tracemalloc.start()
    begun = time.thread_time()
    try:
        yield
        spent, (_, peak) = time.thread_time() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spent < machine.seconds(SECONDS)
    assert peak < IN_PARENT_BYTES
    for pid in POOL.pids():
        assert peak_bytes(pid) <= AT_START_BYTES + MEMORY_BYTES
    assert render("{{ messages[0].content }}") == "Hello!"


@pytest.mark.parametrize("source", MEMORY_ATTACKS)
@pytest.mark.usefixtures("bounded")
def test_a_template_takes_no_more_memory_than_it_may(source):
    with pytest.raises(InferneoError, match=SAID):
        render(source)


@pytest.mark.parametrize("source", TIME_ATTACKS)
@pytest.mark.usefixtures("bounded")
def test_a_template_takes_no_more_time_than_it_may(source):
    with pytest.raises(InferneoError, match=r"0\.5 seconds of CPU time|within 2 seconds"):
        render(source)


@pytest.mark.parametrize("source", GROWING_ATTACKS)
@pytest.mark.usefixtures("bounded")
def test_a_template_that_runs_away_is_stopped(source):
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", NESTED.values(), ids=NESTED)
@pytest.mark.usefixtures("bounded")
def test_a_template_nested_deeply_is_refused_or_works(source):
    try:
        ChatTemplate(source, {})
    except TokenizerError as error:
        assert str(error).startswith("the chat template does not compile: ")  # noqa: PT017


@pytest.mark.usefixtures("bounded")
def test_indented_json_of_nested_tools_takes_no_more_than_it_may():
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    with pytest.raises(TemplateError, match="tools and variables that are less deeply nested"):
        render("{{ tools | tojson(indent=4) }}", tools=[deep] * 750)


@pytest.mark.usefixtures("bounded")
def test_an_error_is_no_longer_than_it_may_be():
    with pytest.raises(TemplateError, match=r"refused: x+$") as caught:
        render("{{ raise_exception('x' * 7000000) }}")
    assert len(str(caught.value)) < 1100


def test_the_longest_text_arrives_whole():
    eighth = "é" * 999_999 + "\n"
    text = render("{{ eighth * 8 }}", eighth=eighth)
    assert text == eighth * 8
    assert len(text) == MAX_CHARACTERS


@pytest.mark.parametrize("source", ["{{ 'a'.encode('idna') }}", "{% include '/etc/passwd' %}"])
def test_an_error_names_no_path_of_this_machine(source):
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "site-packages" not in str(caught.value)


def test_every_rendering_has_its_own_time(monkeypatch):
    monkeypatch.setattr("inferneo_jax.text.chat_template.MAX_SECONDS", 0.3)
    template = ChatTemplate("{% for n in range(99999) %}{% endfor %}ok", {})
    begun = time.monotonic()
    while time.monotonic() - begun < 1:
        text = template.render(
            HELLO, add_generation_prompt=True, continue_final_message=False, variables={}
        )
        assert text == "ok"
