"""Prompts of a given length in tokens, made without the model's tokenizer.

They consist of words that are one token each in every common vocabulary. The tokens of a prompt
beyond its words are found by asking the server twice (``server.cli.bench.api``).
"""

import random
from dataclasses import dataclass

from server.cli.bench.errors import BenchError

_WORDS = """
the of and to in is was for on that with as are from at his this have not but had they you were
their one all can has there been if more when will would who so no out up into them then some
could time these two may first any new my now such like our over man me even most made after
also did many before must through back years where much your way well down should because each
just those people too little state good very make world still own see men work long get here
between both life being under never day same another know while last might us great old year off
come since against go came right used take three
"""
WORDS = _WORDS.split()
PROBES = (32, 96)
"""The number of words in the two prompts whose sizes are measured."""


def words(count: int, rng: random.Random) -> str:
    """Return a text of ``count`` random words."""
    return " ".join(rng.choices(WORDS, k=count))


@dataclass(frozen=True)
class PromptSize:
    """The number of tokens that the server counts in a text, by its number of words."""

    overhead: float
    tokens_per_word: float

    @classmethod
    def fit(cls, tokens: tuple[int, int]) -> "PromptSize":
        """Fit the size from those of texts of ``PROBES`` words, in tokens."""
        slope = (tokens[1] - tokens[0]) / (PROBES[1] - PROBES[0])
        if slope <= 0:
            raise BenchError(
                f"the server counted {tokens[0]} tokens in {PROBES[0]} words and {tokens[1]} in "
                f"{PROBES[1]}; prompts of a given length cannot be made for it"
            )
        return cls(tokens[0] - slope * PROBES[0], slope)

    def words_for(self, tokens: int, what: str = "--prompt-tokens") -> int:
        """Return the number of words for a prompt of ``tokens`` tokens.

        Raises:
            BenchError: the tokens around the words already take that many.
        """
        count = round((tokens - self.overhead) / self.tokens_per_word)
        if count < 1:
            least = round(self.overhead + self.tokens_per_word + 0.5)
            raise BenchError(
                f"{what} is {tokens}; the least is {least} here, for what the server puts around a "
                "prompt"
            )
        return count
