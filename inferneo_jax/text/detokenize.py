"""Decoding of token ids to text while they are being generated."""

import codecs
from collections.abc import Set as AbstractSet

from inferneo_jax.errors import TokenizerError
from inferneo_jax.text.tokenizer import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Decodes the tokens of one sequence as they arrive, without splitting a character.

    The results of all pushes and of :meth:`flush`, joined, equal ``tokenizer.decode(all ids)`` for
    any ids of a byte-level vocabulary. With byte-fallback vocabularies this holds if the byte
    tokens spell valid UTF-8: for one invalid byte, decoding all at once drops a whole run of byte
    tokens, of which a stream has already shown the valid ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        keep: AbstractSet[int] = frozenset(),
    ) -> None:
        """Begin a sequence.

        Args:
            tokenizer: the model's.
            skip_special_tokens: whether special tokens are no part of the text.
            keep: special tokens that are a part of it all the same.

        Raises:
            TokenizerError: the tokenizer's words cannot be joined one by one.
        """
        if tokenizer.kind == "words":
            raise TokenizerError(
                "this tokenizer joins words by rules that look ahead; it cannot decode a stream"
            )
        self._pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._keep = keep
        self._all_pieces = tokenizer.pieces(skip_special_tokens=False)
        self._decode = _utf8_decoder("replace").decode
        self._strip = tokenizer.strips_leading_space

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes; "" while a character is incomplete."""
        try:
            piece = self._pieces[token_id]
            if not piece and token_id in self._keep:
                piece = self._all_pieces[token_id]
        except IndexError:  # models pad their logits beyond the vocabulary
            return ""
        text = self._decode(piece)
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """Return the rest at the end of the sequence: U+FFFD for an incomplete character."""
        return self._decode(b"", True)
