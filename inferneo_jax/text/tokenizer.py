"""Converts text to token ids and back, as a checkpoint's ``tokenizer.json`` defines.

The stateful parts are in other modules:
:class:`~inferneo_jax.text.detokenize.IncrementalDecoder` decodes streams and
:class:`~inferneo_jax.text.stops.StopMatcher` finds stop strings.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tokenizers

from inferneo_jax.errors import RequestError, TemplateError, TokenizerError
from inferneo_jax.files import read_object, shown
from inferneo_jax.text.chat_template import ChatTemplate, Message
from inferneo_jax.text.tokenizer_json import guarded, read_tokenizer, template_text, token_ids

PieceKind = Literal["bytes", "sentencepiece", "words"]
"""How tokens spell text: in a byte alphabet, with marks for spaces, or as words (WordPiece)."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_MARKER = re.compile("<[^ ]+>")
_STRANGE = "\u0100"
"""What stands for characters that spell no byte, which only added tokens have."""
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """A model's tokenizer; every method may be called from any thread.

    Attributes:
        vocab_size: one more than the highest token id; a model's logits may have more columns.
        bos_token_id: the beginning-of-sequence token, or None.
        eos_token_ids: the tokens that end a sequence.
        special_ids: control tokens, which ``skip_special_tokens`` omits from decoded text.
        marker_ids: these, and added tokens like ``<think>``, which mark parts of a text.
        kind: how the tokens spell text.
        strips_leading_space: whether decoding drops one space at the start of the text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
    ) -> None:
        # A tokenizer.json may truncate or pad every text, but the server handles lengths itself.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        with guarded("the tokenizer cannot encode a text"):
            self._suffix = _added_suffix(backend)
        named = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name)))}
        self._template = _chat_template(config, named)

        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.marker_ids = self.special_ids | {
            index for index, token in added.items() if _MARKER.fullmatch(token.content)
        }
        eos = vocab.get(named.get("eos_token", ""))
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos} if eos is not None else set())
        bos = vocab.get(named.get("bos_token", ""))
        self.bos_token_id = bos if bos is not None else bos_token_id

        steps = _decoder_steps(backend)
        self.kind, spell = _speller(steps)
        self.strips_leading_space = self.kind == "sentencepiece" and any(
            step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never"
            for step in steps
        )
        # Ids without a token (gaps in the vocabulary) stay empty, because decoding omits them.
        pieces, spelled = [b""] * self.vocab_size, [""] * self.vocab_size
        for (token, index), piece in zip(vocab.items(), spell(vocab), strict=True):
            pieces[index], spelled[index] = piece, token
        self._pieces, self._spelled = pieces, spelled
        self._plain_pieces = pieces.copy()
        for index in self.special_ids:
            self._plain_pieces[index] = b""

    @classmethod
    def from_text(cls, tokenizer_json: str, config: dict[str, Any]) -> Self:
        """Build a tokenizer from the content of its files, which must have been checked on reading.

        Raises:
            TokenizerError: the content is malformed, or the chat template does not compile.
        """
        with guarded("the tokenizer cannot be read"):
            backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        return cls(backend, config)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``inferneo.json`` of a folder.

        The last two files may be missing.

        Raises:
            TokenizerError: a file is missing or malformed, or the chat template does not compile.
        """
        folder = Path(path)
        checkpoint = _read_json(folder / "inferneo.json")
        bos = token_ids(checkpoint.get("bos_token_id"), f"{folder}: bos_token_id")
        return cls(
            read_tokenizer(folder / "tokenizer.json"),
            _read_json(folder / "tokenizer_config.json"),
            eos_token_ids=token_ids(checkpoint.get("eos_token_ids"), f"{folder}: eos_token_ids"),
            bos_token_id=min(bos, default=None),
        )

    def difference(self, other: "Tokenizer") -> str | None:
        """The first token that another tokenizer spells otherwise, in words; None: they agree."""
        for index, (mine, theirs) in enumerate(zip(self._pieces, other._pieces, strict=False)):
            if mine != theirs:
                return f"token {index} is {shown(mine)} and not {shown(theirs)}"
        if self.vocab_size != other.vocab_size:
            return f"there are {other.vocab_size} tokens and not {self.vocab_size}"
        return None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, which :meth:`render_chat` needs."""
        return self._template is not None

    @property
    def chat_template(self) -> str:
        """The Jinja text of the chat template; empty if there is none."""
        return self._template.text if self._template else ""

    @property
    def template_variables(self) -> frozenset[str]:
        """The names of the variables that the chat template reads besides the messages."""
        return self._template.variables if self._template else frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of ``text``; special tokens that are written out in it are recognized.

        Args:
            text: valid Unicode.
            add_special_tokens: whether to add the tokens that the model expects around a text,
                such as BOS.

        Raises:
            RequestError: the text contains a lone surrogate.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
    ) -> list[list[int]]:
        """Encode many texts at once, as :meth:`encode` does.

        Each result has at most ``max_tokens`` ids, including the added special tokens.
        """
        for text in texts:
            _check_unicode(text)
        # The fast variant does not track character offsets, which are not needed here.
        with guarded("a text cannot be encoded", RequestError):
            encodings = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        suffix = self._suffix if add_special_tokens else []
        return [_truncated(encoding.ids, max_tokens, suffix) for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; invalid UTF-8 becomes U+FFFD and unknown ids are skipped."""
        with guarded("the tokens cannot be decoded", RequestError):
            # Only the batch variant lets other threads run in the meantime.
            (text,) = self._backend.decode_batch(
                [list(ids)], skip_special_tokens=skip_special_tokens
            )
        return text

    def render_chat(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Render the prompt text of a conversation.

        Args:
            messages: the role and the content of each message; the content is a string.
            add_generation_prompt: end the prompt with the opening of the assistant's answer.
            continue_final_message: end the prompt with the text of the last message, so that the
                model continues it; no generation prompt is added then.
            **template_kwargs: further variables of the template.

        Raises:
            TemplateError: the model has no chat template, or the template rejected the messages.
        """
        if self._template is None:
            raise TemplateError("this model has no chat template; use text completion", "messages")
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=template_kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """Render a conversation as :meth:`render_chat` does, and return its token ids.

        The template writes the special tokens itself, so encoding adds none.
        """
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds to the text, which may be only part of a character.

        The result is empty for an id without a token.
        """
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """The text that a token adds; incomplete characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id without a token."""
        return self._spelled[token_id] if 0 <= token_id < self.vocab_size else ""

    def pieces(self, *, skip_special_tokens: bool) -> Sequence[bytes]:
        """The bytes of every token, by id; empty for special tokens if these are skipped."""
        return self._plain_pieces if skip_special_tokens else self._pieces


def _read_json(file: Path) -> dict[str, Any]:
    """Read the JSON object in ``file``; it is empty if the file does not exist."""
    try:
        return read_object(file, error=TokenizerError)
    except FileNotFoundError:
        return {}


def _token_text(entry: object) -> str | None:
    """The text of a named token in tokenizer_config.json, which is a string or an object."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _chat_template(config: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    source = template_text(config.get("chat_template"), "tokenizer_config.json")
    return None if source is None else ChatTemplate(source, named)


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    decoder = backend.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


def _speller(
    steps: list[dict[str, Any]],
) -> tuple[PieceKind, Callable[[Iterable[str]], Iterable[bytes]]]:
    """Return how tokens spell text, and the function that maps tokens to their bytes."""
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()

        def from_alphabet(tokens: Iterable[str]) -> Iterable[bytes]:
            tokens = list(tokens)
            # At once, as a character is a byte; one by one would take several times as long.
            whole = "".join(tokens).translate(alphabet)
            end = 0
            for token in tokens:
                start, end = end, end + len(token)
                part = whole[start:end]
                yield token.encode() if _STRANGE in part else part.encode("latin-1")

        return "bytes", from_alphabet
    marks = [
        step["replacement"] if step["type"] == "Metaspace" else step["pattern"]["String"]
        for step in steps
        if step["type"] == "Metaspace"
        or (step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"])
    ]
    if marks:
        mark, has_bytes = marks[0], "ByteFallback" in kinds

        def from_marks(token: str) -> bytes:
            if has_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
                return bytes.fromhex(byte[1])
            return token.replace(mark, " ").encode()

        return "sentencepiece", lambda tokens: map(from_marks, tokens)
    prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), "")
    return "words", lambda tokens: (token.removeprefix(prefix).encode() for token in tokens)


class _ByteAlphabet(dict[int, int]):
    """A table for ``str.translate`` that maps all other characters to one outside of Latin-1."""

    def __missing__(self, character: int) -> int:
        return ord(_STRANGE)


def _byte_alphabet() -> _ByteAlphabet:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, all other bytes from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    spelled = _ByteAlphabet((byte, byte) for byte in shown)
    spelled.update((256 + order, byte) for order, byte in enumerate(hidden))
    return spelled


def _check_unicode(text: str) -> None:
    """Check that ``text`` can be encoded as UTF-8.

    Raises:
        RequestError: the text contains a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send whole characters"
        ) from None


def _added_suffix(backend: tokenizers.Tokenizer) -> list[int]:
    """The tokens that encoding adds after a text, such as BERT's ``[SEP]``."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[start + len(bare) :]
    return []


def _truncated(ids: list[int], max_tokens: int | None, suffix: list[int]) -> list[int]:
    """The first ``max_tokens`` of ``ids`` (None: all), ending in ``suffix`` if there is room."""
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    kept = max_tokens - len(suffix)
    return [*ids[:kept], *suffix] if kept > 0 else ids[:max_tokens]
