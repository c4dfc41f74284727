"""Token ids and rendered conversations, for the tokenizers to be compared with.

Usage: python tests/tools/make_tokens.py SMOLLM2.gguf MINILM_FOLDER    (versions: see golden.py)

Writes tokens.json. ``cases``: each ``text`` with its ``chat_ids``, the text they decode to with
special tokens left out (``chat_text``; null: the text itself), ``embedding_ids`` with [CLS] and
[SEP], and their ``embedding_text`` likewise. ``chats``: messages, options and the ``rendered``
text with its ``ids``.
"""

import sys
from pathlib import Path
from typing import Any

import golden
from transformers import AutoTokenizer

OPTIONS = ("add_generation_prompt", "continue_final_message")


def decoded(tokenizer: Any, ids: list[int], text: str) -> str | None:
    """The decoded text without special tokens, or None where it is the text itself."""
    result: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
    return None if result == text else result


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    chat, embedding = golden.chat_tokenizer(gguf), AutoTokenizer.from_pretrained(folder)
    asked, cases = golden.asked("tokens.json"), []
    for text in (case["text"] for case in asked["cases"]):
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
    for case in asked["chats"]:
        messages = case["messages"]
        options = {name: case[name] for name in OPTIONS if name in case}
        rendered = chat.apply_chat_template(messages, tokenize=False, **options)
        ids = chat.encode(rendered, add_special_tokens=False)
        chats.append({"messages": messages, **options, "rendered": rendered, "ids": ids})
    about = golden.about(gguf, folder / "tokenizer.json")
    golden.write("tokens.json", {"about": about, "chats": chats}, cases)


if __name__ == "__main__":
    main()
