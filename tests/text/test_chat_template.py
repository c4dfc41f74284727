import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferneo_jax.errors import TemplateError
from inferneo_jax.text.chat_template import ChatTemplate
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.weights.sources.gguf_tokenizer import gguf_tokenizer
from tests.support.paths import GOLDEN

CHATS = json.loads((GOLDEN / "tokens.json").read_text())["chats"]
HELLO = [{"role": "user", "content": "Hello!"}]
tiny = Tokenizer.from_directory(GOLDEN / "families" / "llama-tied")


def render(source: str, messages=HELLO, **variables) -> str:
    return ChatTemplate(source, {"eos_token": "</s>"}).render(
        messages, add_generation_prompt=True, continue_final_message=False, variables=variables
    )


@pytest.mark.real
@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: repr(chat["rendered"][-30:]))
def test_rendered_chats_equal_the_reference(real_checkpoints, chat):
    tokenizer = Tokenizer.from_directory(real_checkpoints / "smollm2-135m-instruct")
    names = ("add_generation_prompt", "continue_final_message")
    options = {name: chat[name] for name in names if name in chat}
    assert tokenizer.render_chat(chat["messages"], **options) == chat["rendered"]
    assert tokenizer.encode_chat(chat["messages"], **options) == chat["ids"]


def test_a_template_sees_tokens_variables_and_no_tools():
    source = "{{ eos_token }}|{{ mood }}|{{ tools is none }}|{{ add_generation_prompt }}"
    assert render(source, mood="calm") == "</s>|calm|True|True"


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, 1 << 20_000], ids=type)
def test_what_is_not_json_cannot_be_rendered(value):
    with pytest.raises(TemplateError, match="must be JSON"):
        render("{{ x }}", x=value)


@pytest.mark.parametrize("depth", [980, 2000, 100_000])
def test_values_nested_too_deeply_are_refused(depth):
    deep: list = []
    for _ in range(depth):
        deep = [deep]
    with pytest.raises(TemplateError, match=r"less deeply|nest them less"):
        render("{{ tools | tojson(indent=4) }}{{ tools | pprint }}", tools=deep)


def test_a_lone_surrogate_passes():
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "\ud800"}]) == "\ud800"


def test_what_the_template_raises_is_what_the_error_says():
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "path",
    [
        "''.format.__self__",
        "messages.__class__",
        "messages['__class__']",
        "messages | attr('__class__')",
        "messages | map(attribute='__class__') | first",
        "lipsum.__globals__",
        "namespace.mro",
        "joiner.__init__",
        "raise_exception.__code__",
    ],
)
def test_what_belongs_to_python_is_not_there(path):
    assert render("{{ (" + path + ") is undefined }}") == "True"


@pytest.mark.parametrize("content", [None, 3, ["part"]])
def test_content_that_a_template_cannot_write_is_the_requests_fault(content):
    with pytest.raises(TemplateError, match=r"chat template (refused|cannot write)"):
        render("{{ 'x' + messages[0].content }}", [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ (messages | attr('__class__')).__name__ }}",
        "{{ range.__call__.__func__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set _ = messages.append({}) %}",
        "{% set _ = messages[0].update(role='system') %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ dict.mro() }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ '%s' | format(messages.__init__.__globals__) }}",
        "{{ '{0.__init__.__globals__}'.format_map({'0': cycler}) }}",
    ],
)
def test_a_template_reaches_no_internals_and_changes_nothing(source):
    messages = [{"role": "user", "content": "Hello!"}]
    with pytest.raises(TemplateError):
        render(source, messages)
    assert messages == HELLO


@given(st.text(st.characters(exclude_categories=["Cs", "Co"])))
def test_a_continued_message_ends_the_prompt(content):
    messages = [*HELLO, {"role": "assistant", "content": content}]
    text = tiny.render_chat(messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n" + content)


def test_a_template_that_trims_still_ends_with_the_continued_message():
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": " One, "}]
    text = ChatTemplate(source, {}).render(
        messages, add_generation_prompt=True, continue_final_message=True, variables={}
    )
    assert text == "[Hello!][One,"


@pytest.mark.parametrize(
    "messages", [[{"role": "assistant"}], [{"role": "assistant", "content": None}]]
)
def test_there_must_be_a_text_to_continue(messages):
    with pytest.raises(TemplateError, match="whose content is a text"):
        tiny.render_chat(messages, continue_final_message=True)


def test_a_template_that_drops_the_last_message_cannot_continue_it():
    with pytest.raises(TemplateError, match="does not write the last message"):
        ChatTemplate("nothing", {}).render(
            HELLO, add_generation_prompt=False, continue_final_message=True, variables={}
        )


def test_no_messages_are_refused():
    with pytest.raises(TemplateError, match="messages is empty"):
        tiny.render_chat([])


def test_the_messages_cannot_be_replaced_by_a_variable():
    with pytest.raises(TemplateError) as caught:
        tiny.render_chat(HELLO, messages=[])
    assert caught.value.param == "chat_template_kwargs"


def test_without_a_template_there_is_no_chat():
    tokenizer = Tokenizer.from_directory(GOLDEN / "families" / "bert")
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.render_chat(HELLO)


def test_a_beginning_that_the_template_writes_is_not_added_again():
    backend, config = gguf_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": ["<s>", *"Helo!"],
            "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        }
    )
    tokenizer = Tokenizer(backend, config)
    assert tokenizer.encode("Hello!") == tokenizer.encode_chat(HELLO) == [0, 1, 2, 3, 3, 4, 5]
