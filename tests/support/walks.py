"""Random texts under the masks of a grammar."""

import numpy as np
import tokenizers

from inferneo_jax.request import Constraint
from inferneo_jax.text.grammar import ConstrainedRow, GrammarCompiler, fill_masks
from inferneo_jax.text.tokenizer import Tokenizer
from tests.support.tiny_model import TINY

_CLOSING = frozenset(b'"}]')
_LONG = 40
"""After this many tokens, a walk prefers tokens that close something."""


def tiny_speller() -> Tokenizer:
    """As many tokens as the tiny model has: a character each, two words, and an end."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:94]
    vocab = {piece: i for i, piece in enumerate([*characters, "EN", "END"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("E", "N"), ("EN", "D")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    made = Tokenizer(backend, {"eos_token": "<|end|>"})
    assert made.vocab_size == TINY.vocab_size
    return made


def mask_words(tokenizer: Tokenizer) -> int:
    return -(-tokenizer.vocab_size // 32)


def allowed_of(mask: np.ndarray) -> np.ndarray:
    """The ids of the tokens that a mask of one row allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    constraint: Constraint,
    rng: np.random.Generator,
    max_tokens: int = 400,
) -> str | None:
    """The text of a random walk; None: it was not complete after ``max_tokens``.

    Raises:
        ConstraintError: the grammar cannot be compiled, or not be followed.
    """
    matcher = compiler.compile(constraint)
    tokens: list[int] = []
    masks = np.zeros((1, mask_words(tokenizer)), np.uint32)
    closing = [i for i in range(tokenizer.vocab_size) if _closes(tokenizer.token_bytes(i))]
    for count in range(max_tokens):
        fill_masks([ConstrainedRow(matcher, 0)], masks)
        if matcher.error:
            raise matcher.error
        allowed = allowed_of(masks[0])
        ends = np.intersect1d(allowed, sorted(tokenizer.eos_token_ids))
        others = np.setdiff1d(allowed, ends)
        if len(ends) and (not len(others) or rng.random() < 0.3 or count > _LONG):
            return tokenizer.decode(tokens)
        allowed = others
        preferred = np.intersect1d(allowed, closing)
        if len(preferred) and rng.random() < (0.8 if count > _LONG else 0.1):
            allowed = preferred
        tokens.append(int(rng.choice(allowed)))
        ended = matcher.consume(tokens[-1])
        if matcher.error:
            raise matcher.error
        if ended:
            return tokenizer.decode(tokens)
    return None


def _closes(piece: bytes) -> bool:
    return bool(piece) and piece[-1] in _CLOSING
