"""Token ids to text while they are still being generated."""

import codecs

from inferneo_jax.errors import TokenizerError
from inferneo_jax.text.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Turns one sequence's tokens into text as they come, never splitting a character.

    What the pushes returned, joined, and then :meth:`flush` equal
    ``tokenizer.decode(all ids)``, for any ids of a byte-level vocabulary. With byte-fallback
    vocabularies this holds as long as the byte tokens spell valid UTF-8: there, decoding at once
    drops a whole run of byte tokens for one bad byte, of which a stream has shown the good ones.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        if tokenizer.kind == "words":
            raise TokenizerError(
                "this tokenizer joins words by rules that look ahead; it cannot decode a stream"
            )
        self._pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._decode = _utf8_decoder("replace").decode
        self._strip = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while a character is open."""
        try:
            piece = self._pieces[token_id]
        except IndexError:  # models pad their logits beyond the vocabulary
            return ""
        text = self._decode(piece)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for a character never completed."""
        return self._decode(b"", True)
