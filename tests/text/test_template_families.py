"""Templates in the idioms of the known families give what transformers gives, byte by byte.

The templates are our own; tests/support/template_reference.py compares those of real models.
"""

# ruff: noqa: E501  (a template's lines are part of what it writes)

import jinja2.defaults
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.support.template_reference import by_transformers, by_us, cases

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')
                .split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- '\\n' + content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

INST = """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = false -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.first and system_message -%}
            {{ '[INST] <<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] }}
        {%- else -%}
            {{ '[INST] ' + message['content'] }}
        {%- endif -%}
        {{ ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ ' ' ~ message['content'] ~ ' ' ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

HEADERS = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['content'] is string %}
            {{- message['content'] | trim }}
        {%- else %}
            {%- for content in message['content'] %}
                {%- if content['type'] == 'image' %}
                    {{- '<|image|>' }}
                {%- elif content['type'] == 'text' %}
                    {{- content['text'] }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + tool_call.arguments | tojson }}
        {%- if tool_call.arguments is mapping %}
            {%- for arg_name, arg_val in tool_call.arguments | items %}
                {{- arg_name + '="' ~ arg_val ~ '"' }}
                {%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- "}<|eom_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

TURNS = """
{{ bos_token }}
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- elif content is iterable -%}
        {%- for item in content -%}
            {%- if item['type'] == 'image' -%}<image>{%- else -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
{%- endmacro -%}
{% for message in messages | rejectattr('role', 'equalto', 'system') %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<start_of_turn>{{ role }}
{{ text_of(message.content) }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

RECURSIVE = """
{%- macro type_of(spec) -%}
    {%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if basic[spec.type] is defined %}{{- basic[spec.type] }}
    {%- elif spec.type == "array" %}{{- "list[" + type_of(spec["items"]) + "]" }}
    {%- elif spec.type == "object" %}
        {{- "{" }}
        {%- for name, value in spec.properties | dictsort %}
            {{- name ~ ": " ~ type_of(value) ~ ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "}" }}
    {%- elif spec.type is iterable %}
        {%- for each in spec.type %}{{- type_of({"type": each}) ~ "|" }}{%- endfor %}
    {%- else %}{{- "any" }}{%- endif %}
{%- endmacro %}
{%- for tool in tools | default([], true) %}
    {{- tool.function.name }}({{ type_of(tool.function.parameters) }}) ->
    {%- if tool.function.return is defined %} {{ type_of(tool.function.return) }}{% endif %}{{ "\\n" }}
{%- endfor %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{%- set ns.system_prompt = message['content'] %}{%- endif %}
{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.is_tool = false %}{{ '<|User|>' ~ message['content'] }}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] %}
        {%- for tool in message['tool_calls'] %}
            {%- if not ns.is_first %}{{ '<|calls|>' }}{%- set ns.is_first = true %}{%- endif %}
            {{- '<|call|>' ~ tool['function']['name'] ~ '\\n```json\\n' }}
            {{- tool['function']['arguments'] | tojson(ensure_ascii=true, sort_keys=true) ~ '\\n```' }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + content + eos_token }}
    {%- else %}{{ '<|' ~ message.role | upper ~ '|>' ~ message.content | replace('"', "'") }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|>' }}{% endif %}
"""

CHANNELS = """
{%- if documents %}
{% for document in documents %}
Document {{ loop.index }}: {% for key, value in document.items() %}{{ key }}={{ value }};{% endfor %}

{% endfor %}
{% endif %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {%- if message.thinking -%}
            {{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif -%}
        {{- "<|channel|>final<|message|>" ~ message.content ~ "<|return|>" }}
        {%- endgeneration -%}
    {%- elif message.role in ['user', 'system', 'developer'] -%}
        {{- "<|start|>%s<|message|>%s<|end|>" | format(message.role, message.content) }}
    {%- elif message.role == 'tool' -%}
        {%- if loop.previtem and loop.previtem.role == 'tool' %}{% continue %}{% endif -%}
        {{- "<|start|>functions to=assistant<|message|>" + message.content | tojson + "<|end|>" }}
    {%- else -%}
        {% break %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
{% if thinking is defined and thinking %}<|channel|>analysis{% endif %}
"""

FAMILIES = {
    "chatml": CHATML,
    "inst": INST,
    "headers": HEADERS,
    "turns": TURNS,
    "recursive": RECURSIVE,
    "channels": CHANNELS,
    "json": "{{ [messages, tools, documents] | tojson(separators=(',', ':'), indent=2) }}"
    "{# transformers continues what reads content #}",
    "repr": "{{ messages }}{{ tools }}{{ bos_token }}{{ unk_token | default('?') }}",
}

FILTERS = {
    "abs": "-3 | abs",
    "attr": "messages | attr('x') is defined",
    "batch": "[1, 2, 3] | batch(2, 0) | list",
    "capitalize": "'hÉLLO' | capitalize",
    "center": "'x' | center(5)",
    "count": "messages | count",
    "d": "nothing | d('d')",
    "default": "nothing | default('d')",
    "dictsort": "{'b': 1, 'A': 2} | dictsort",
    "e": "'<a&b>' | e",
    "escape": "'<a>' | escape ~ '<'",
    "filesizeformat": "123456 | filesizeformat",
    "first": "'xyz' | first",
    "float": "'1.5' | float",
    "forceescape": "'<' | safe | forceescape",
    "format": "'%s-%05.1f' | format('x', 2)",
    "groupby": "messages | groupby('role') | list | length",
    "indent": "'a\nb' | indent(2, true)",
    "int": "'0x1F' | int(0, 16)",
    "items": "{'a': 1} | items | list",
    "join": "[1, 2] | join('-')",
    "last": "[1, 2] | last",
    "length": "'é' | length",
    "list": "'ab' | list",
    "lower": "'ÀB' | lower",
    "map": "messages | map(attribute='role') | map('upper') | list",
    "max": "[1, 3, 2] | max",
    "min": "['b', 'a'] | min",
    "pprint": "{'a': ['x' * 50, 'y' * 50]} | pprint",
    "random": "[7] | random",
    "reject": "[1, 2, 3] | reject('odd') | list",
    "rejectattr": "messages | rejectattr('role', 'equalto', 'user') | list",
    "replace": "'aaa' | replace('a', 'b', 2)",
    "reverse": "'abc' | reverse",
    "round": "2.55 | round(1, 'floor')",
    "safe": "'<' | safe",
    "select": "[0, 1] | select | list",
    "selectattr": "messages | selectattr('role', 'in', ['user']) | list | length",
    "slice": "[1, 2, 3] | slice(2) | list",
    "sort": "['b', 'A'] | sort(reverse=true)",
    "string": "1.0 | string",
    "striptags": "'<b>x</b> &lt;y&gt; <!-- z -->' | striptags",
    "sum": "[1, 2.5] | sum",
    "title": "'it is' | title",
    "tojson": "{'é': [1, none, true, '<']} | tojson(indent=1)",
    "trim": "' x ' | trim",
    "truncate": "'one two three four' | truncate(9)",
    "unique": "['a', 'A', 'b'] | unique | list",
    "upper": "'ß' | upper",
    "urlencode": "'a b/é' | urlencode",
    "urlize": "'see https://example.org now' | urlize",
    "wordcount": "'one two' | wordcount",
    "wordwrap": "'one two three' | wordwrap(5)",
    "xmlattr": "{'a': '<'} | xmlattr",
}
OTHERS = [
    "{{ '\\n\\t\\u00e9\\N{GREEK SMALL LETTER BETA}' }}",
    "{{ strftime_now('%Y-%m-%d, %A %d. %B') }}",
    "{{ strftime_now('%d日') }}",
    "{{ dict(a=1).items() | list }}{{ dict.fromkeys('ab', 1) }}",
    "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = ns.a + ns.self %}{{ ns.b }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}",
    "{{ cycler('a', 'b').next() }}{{ joiner(',')() }}{{ lipsum(n=0) }}",
    "{{ range(100000) | length }}",
    "{{ range(100001) | length }}",
    "{{ 7 // 2 ** 2 % 3 }} {{ 'ab' * 2 ~ 1.0 }} {{ 1 in [1] and not false }} {{ 1 < 2 < 3 }}",
    "{{ '{:>5}|{x!r}'.format('a', x='b') }}{{ '%(a)s' % {'a': 1} }}",
    "{% for a, b in {'x': [1, {'y': 2}]} | items recursive %}{{ a }}{{ loop.depth }}{% endfor %}",
    "  {% if true %}\n  x\n  {% endif %}\n\n{# comment #}\ny{{ '' }}\n",
    "{% raw %}{{ x }}{% endraw %}{% filter upper %}é{% endfilter %}{% with x = 1 %}{{ x }}{% endwith %}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | length }}{{ self }}{{ messages[0].nothing.more }}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ caller() }}{% endmacro %}"
    "{% call m(1, 3, 4) %}called{% endcall %}",
    "{{ 'a' + 'b' ~ 1 ~ none }}{{ '%03d' % 7 }}{{ 'x'.center(5) }}{{ messages | join('-', attribute='role') }}",
    "{% for n in range(9) %}\n  {% if n == 3 %}{% break %}{% endif %}\n{{ n }}\n{% endfor %}",
    "{% include 'x' %}",
    "{% if %}",
]


def compare(source: str) -> int:
    """Compare all conversations; the number of those that transformers wrote out."""
    texts = 0
    for name, messages, options in cases():
        theirs = by_transformers(source, messages, **options)
        assert by_us(source, messages, **options) == theirs, name
        texts += theirs is not None
    return texts


@pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_written_as_transformers_writes_it(source):
    assert compare(source) > 10


@pytest.mark.parametrize("source", OTHERS)
def test_the_language_is_that_of_transformers(source):
    messages = [{"role": "user", "content": "Hi"}]
    assert by_us(source, messages) == by_transformers(source, messages)


@pytest.mark.parametrize("name", sorted({*jinja2.defaults.DEFAULT_FILTERS} - {"random"}))
def test_a_filter_gives_what_it_gives_in_transformers(name):
    source = "{{ " + FILTERS[name] + " }}"
    messages = [{"role": "user", "content": "Hi"}]
    text = by_us(source, messages)
    assert text is not None
    assert text == by_transformers(source, messages)


@pytest.mark.parametrize("name", sorted(ImmutableSandboxedEnvironment().tests))
def test_every_test_is_there(name):
    argument = "" if name in ("defined", "undefined", "none") else "(1)"
    for source in ("{{ 1 is " + name + " }}", "{{ 1 is " + name + argument + " }}"):
        messages = [{"role": "user", "content": "Hi"}]
        assert by_us(source, messages) == by_transformers(source, messages)
