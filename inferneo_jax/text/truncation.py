"""What may go into a tokenizer, and cutting what comes out of it."""

from collections.abc import Sequence

import tokenizers

from inferneo_jax.errors import RequestError


def refuse_surrogates(text: str) -> None:
    """Let pass what is valid Unicode.

    Raises:
        RequestError: the text holds a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send whole characters"
        ) from None


def tokens_behind(backend: tokenizers.Tokenizer) -> list[int]:
    """The tokens that encoding adds behind a text, such as BERT's ``[SEP]``."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[start + len(bare) :]
    return []


def cut(ids: list[int], most: int | None, behind: Sequence[int]) -> list[int]:
    """The first ``most`` tokens of ``ids``, the last of them being ``behind`` where there is room.

    None cuts nothing.
    """
    if most is None or len(ids) <= most:
        return ids
    kept = most - len(behind)
    return [*ids[:kept], *behind] if kept > 0 else ids[:most]
