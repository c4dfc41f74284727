"""Token ids and rendered conversations, for the tokenizers to be compared with.

Usage: python tests/tools/make_tokens.py SMOLLM2.gguf MINILM_FOLDER    (versions: see golden.py)

Writes tokens.json. ``cases``: each ``text`` with its ``chat_ids``, the text they decode to with
special tokens left out (``chat_text``; null: the text itself), ``embedding_ids`` with [CLS] and
[SEP], and their ``embedding_text`` likewise. ``chats``: messages, options and the ``rendered``
text with its ``ids``.
"""

# ruff: noqa: RUF001  (look-alike letters are what is tested)

import sys
from pathlib import Path
from typing import Any

import golden
from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "a",
    "Hello",
    " Hello",
    "Hello world!",
    "Hello  world",
    "  multiple   spaces",
    "trailing spaces   ",
    "\n\n\n three newlines",
    "tab\tseparated\t\tvalues",
    "mixed \t \n \r\n white\u00a0space\u2003em\u3000ideographic\u200bzero",
    "0",
    "1234567890",
    "x  12 345",
    "3.14159 and -2.71e-10",
    "007 agents, 1,000,000 dollars",
    "١٢٣ ४५६ Ⅷ ½ ²",
    "don't can't I'll we've it's she'd I'm they're",
    "DON'T CAN'T I'LL",
    "o\u2019clock \u201cquoted\u201d \u2014 dash\u2026",
    "def f(x):\n    return x ** 2  # squared\n",
    "if (a && b) { c[i] += d->e; }\n\telse\n\t\treturn;",
    "<html><body class='x'>&nbsp;</body></html>",
    "SELECT * FROM t WHERE a = 'b' AND c <> 1;",
    "https://example.org/path?q=1&r=%20#frag",
    "user@example.org",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===###",
    "Café déjà vu.",
    "Cafe\u0301 de\u0301ja\u0300 vu.",
    "Zürich Ångström Łódź Þór ß ẞ",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε",
    "日本語のテキスト、カタカナとひらがな。",
    "中文文本，没有空格。",
    "한국어 텍스트입니다",
    "שלום עולם",
    "مرحبا بالعالم",
    "हिन्दी में पाठ",
    "ภาษาไทย",
    "🙂",
    "🎉🎊 party 🥳!!",
    "👩‍👩‍👧‍👦 family, 👍🏽 thumb, 🇪🇺 flag, ❤️ heart",
    "z\u0335\u0321a\u0316l\u0348g\u034eo\u0353",
    "a\u0000b\u0001c\u0007d\u001be\u007ff",
    "\ufeffbyte order mark",
    "left\u202eright\u202c",
    "\ufffd replacement \ufffe\uffff",
    "𝕬𝖑𝖕𝖍𝖆 𠀀𠀁 𐍈",
    "ﬁ ﬂ ℌ ①",
    "<|im_start|>user\nHi<|im_end|>\n",
    "before<|endoftext|>after",
    " <|im_end|> spaced <|im_end|>",
    "<|im_start",
    "<|im_end|><|im_end|>",
    "[CLS] a [SEP] b [MASK] [UNK] [PAD]",
    "<repo_name>x<file_sep>y<jupyter_code>",
    "The quick brown fox jumps over the lazy dog. " * 6,
]

HELLO = {"role": "user", "content": "Hello!"}
CHATS: list[tuple[list[dict[str, str]], dict[str, bool]]] = [
    ([HELLO], {"add_generation_prompt": True}),
    ([HELLO], {"add_generation_prompt": False}),
    ([{"role": "system", "content": "Be brief."}, HELLO], {"add_generation_prompt": True}),
    ([{"role": "system", "content": ""}, HELLO], {"add_generation_prompt": True}),
    (
        [HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "2 + 2?"}],
        {"add_generation_prompt": True},
    ),
    (
        [HELLO, {"role": "assistant", "content": "Sure, the answer is"}],
        {"continue_final_message": True},
    ),
    ([HELLO, {"role": "assistant", "content": "One, "}], {"continue_final_message": True}),
    ([{"role": "assistant", "content": "  spaced\n\n"}, HELLO], {"add_generation_prompt": True}),
    (
        [{"role": "user", "content": "<b>& \"quotes\" 'single' {{ 7 * 7 }} {% raw %}"}],
        {"add_generation_prompt": True},
    ),
    (
        [{"role": "user", "content": "日本 👩‍🚀\n```py\nx = 1\n```"}],
        {"add_generation_prompt": True},
    ),
    ([{"role": "tool", "content": '{"t": 21}'}], {"add_generation_prompt": True}),
]


def decoded(tokenizer: Any, ids: list[int], text: str) -> str | None:
    """The decoded text without special tokens, or None where it is the text itself."""
    result: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    return None if result == text else result


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    chat, embedding = golden.chat_tokenizer(gguf), AutoTokenizer.from_pretrained(folder)
    cases = []
    for text in TEXTS:
        chat_ids = chat.encode(text)
        embedding_ids = embedding.encode(text, truncation=False)
        cases.append(
            {
                "text": text,
                "chat_ids": chat_ids,
                "chat_text": decoded(chat, chat_ids, text),
                "embedding_ids": embedding_ids,
                "embedding_text": decoded(embedding, embedding_ids, text),
            }
        )
    chats = []
    for messages, options in CHATS:
        rendered = chat.apply_chat_template(messages, tokenize=False, **options)
        ids = chat.encode(rendered, add_special_tokens=False)
        chats.append({"messages": messages, **options, "rendered": rendered, "ids": ids})
    about = golden.about(gguf, folder / "tokenizer.json")
    golden.write("tokens.json", {"about": about, "chats": chats}, cases)


if __name__ == "__main__":
    main()
