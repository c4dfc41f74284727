"""Output of one sequence: decoding, stop strings, echo, log probabilities, parsing. No I/O."""

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from inferneo_jax import GenerationOutput, IncrementalDecoder, StopMatcher, TokenLogprob
from server.parsers.calls import Call, Tools
from server.parsers.parser import Format, OutputParser
from server.prompt.prompts import Prompt

if TYPE_CHECKING:
    from inferneo_jax import Tokenizer


FinishReason = Literal["stop", "length", "abort", "tool_calls"]
"""Why a choice ended: a stop or end token, its maximum length, a cancellation by the client, or an
end token after calls of tools.
"""


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token as clients see it; ``logprob`` is None for the first of a prompt."""

    name: str
    bytes: bytes
    logprob: float | None


@dataclass(frozen=True, slots=True)
class TokenInfo(NamedToken):
    """A token of a choice: it spans the characters from ``offset`` to ``end`` of its text."""

    offset: int
    end: int
    top: tuple[NamedToken, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; ``index`` counts the calls of its choice, ``arguments`` is JSON."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TextPart:
    """The new part of a choice; the texts of all parts, joined, are its text.

    Attributes:
        index: of the choice.
        text: its text; if it is parsed, without reasoning and calls.
        tokens: the tokens whose text is certain, of whatever they are a part.
        finish_reason: why it has ended; None until then.
        reasoning: what comes before the text.
        calls: calls that have become complete.
    """

    index: int
    text: str
    tokens: list[TokenInfo]
    finish_reason: FinishReason | None
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsing:
    """How the text of a choice is parsed.

    Attributes:
        format: how the model writes.
        tools: the tools that are offered; None looks for no calls.
        thinking: whether the prompt has begun the reasoning.
        single: whether the first call ends the choice.
        first_call: number of calls in the conversation so far, for ids that count them.
        keep: special tokens that markers are made of.
    """

    format: Format
    tools: Tools | None
    thinking: bool
    single: bool = False
    first_call: int = 0
    keep: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """Options of a request for its text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    skip_special_tokens: bool = True
    logprobs: bool = False
    echo: bool = False
    suffix: str = ""
    parsing: Parsing | None = None


class OutputProcessor:
    """Turns the engine's outputs for one sequence into events.

    Each token passes through the decoder and the stop matcher separately, so the text, the offsets
    and the cut at a stop string do not depend on how outputs were batched.

    Attributes:
        finish_reason: None while the sequence runs.
        num_tokens: number of tokens sampled so far, not counting those after a stop string.
        num_reasoning: number of them that are reasoning, markers included.
        logprob_sum: the sum of their log probabilities, if the request computes them.
        cached_tokens: number of prompt tokens found in the prefix cache.
    """

    def __init__(
        self, index: int, tokenizer: "Tokenizer", prompt: Prompt, options: TextOptions
    ) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_reasoning = 0
        self.logprob_sum = 0.0
        self.cached_tokens = 0
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._options = options
        parsing = options.parsing
        self._parser: OutputParser | None = None
        self._keep: frozenset[int] = frozenset()
        if parsing is not None:
            self._parser = OutputParser(parsing.format, parsing.tools, thinking=parsing.thinking)
            self._keep = parsing.keep
        self._num_calls = 0
        self._decoder = IncrementalDecoder(
            tokenizer, skip_special_tokens=options.skip_special_tokens, keep=self._keep
        )
        self._matcher = StopMatcher(options.stops, include=options.include_stop)
        self._echoes = options.echo  # whether the prompt, or the rest of it, is still to be shown
        self._echo_decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
        self._echoed = 0  # prompt tokens whose log probabilities have arrived
        self._decoded = 0  # characters so far, including those held back
        self._shown = 0  # characters so far that are certain
        self._text: list[str] = []
        self._tokens: list[TokenInfo] = []
        self._held: deque[TokenInfo] = deque()  # tokens of characters not shown yet

    def feed(self, output: GenerationOutput) -> None:
        """Process the output of a step; outputs after the choice has finished are ignored."""
        if self.finish_reason is not None:
            return
        if self._echoes:
            self._echo(output.prompt_logprobs)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        logprobs: Sequence[TokenLogprob | None] = output.logprobs or [None] * len(output.token_ids)
        for token, logprob in zip(output.token_ids, logprobs, strict=True):
            self._push(token, logprob)
            if self._matcher.matched is not None:
                self._finish("stop")
                return
            if self._parser is not None and self._parser.num_calls and self._single:
                self._finish("stop")
                return
        if (reason := output.finish_reason) is not None:
            assert reason != "error", "a failure ends the whole request"
            self._flush(reason)

    def cancel(self) -> None:
        """Finish with the text so far."""
        if self.finish_reason is None:
            self._flush("abort")

    def take(self) -> TextPart | None:
        """Return the new part since the last call; None if nothing is new."""
        text, reasoning = "".join(self._text), ""
        calls: tuple[ToolCall, ...] = ()
        if self._parser is not None:
            text, reasoning, found = self._parser.take()
            calls = tuple(map(self._identified, found[:1] if self._single else found))
        if not (text or reasoning or calls or self._tokens or self.finish_reason):
            return None
        part = TextPart(self.index, text, self._tokens, self.finish_reason, reasoning, calls)
        self._text, self._tokens = [], []
        return part

    @property
    def mean_logprob(self) -> float:
        """The mean log probability of the sampled tokens, in nats."""
        return self.logprob_sum / max(1, self.num_tokens)

    @property
    def _single(self) -> bool:
        parsing = self._options.parsing
        return parsing is not None and parsing.single

    def _identified(self, call: Call) -> ToolCall:
        """Give a call its place and an id, in the form that the model's template expects."""
        parsing = self._options.parsing
        assert parsing is not None, "only a parser finds calls"
        index, self._num_calls = self._num_calls, self._num_calls + 1
        match parsing.format.ids:
            case "short":
                name = secrets.token_hex(5)[:9]
            case "numbered":
                name = f"functions.{call.name}:{parsing.first_call + index}"
            case "long":
                name = f"call_{secrets.token_hex(12)}"
        return ToolCall(index, name, call.name, call.arguments)

    def _push(self, token: int, logprob: TokenLogprob | None) -> None:
        options = self._options
        self.num_tokens += 1
        if logprob is not None:
            self.logprob_sum += logprob.logprob
        if token in options.stop_token_ids and not options.include_stop:
            return  # it ends the sequence and is no part of the text
        text = self._decoder.push(token)
        if options.logprobs and logprob is not None:
            self._held.append(self._info(token, logprob, len(text) or self._opens(token)))
        self._decoded += len(text)
        # Before min_tokens, a stop string is ordinary text.
        shown = self._matcher.push(text) if self.num_tokens > options.min_tokens else text
        thinking = self._parser is not None and self._parser.thinking
        self._show(shown)
        if self._parser is not None and (thinking or self._parser.thinking):
            self.num_reasoning += 1

    def _opens(self, token: int) -> bool:
        """Return whether a token that completed no character began one, and so owns it."""
        tokenizer = self._tokenizer
        special = token in tokenizer.special_ids and token not in self._keep
        skipped = self._options.skip_special_tokens and special
        return not skipped and bool(tokenizer.token_bytes(token))

    def _show(self, text: str) -> None:
        if text:
            if self._parser is None:
                self._text.append(text)
            else:
                self._parser.push(text)
            self._shown += len(text)
        while self._held and self._held[0].end <= self._shown:
            self._tokens.append(self._held.popleft())

    def _flush(self, reason: FinishReason) -> None:
        """Show the text that was held back; nothing can complete it any more."""
        rest = self._decoder.flush()
        self._decoded += len(rest)
        self._show(self._matcher.push(rest))
        matched = self._matcher.matched is not None
        self._show(self._matcher.flush())
        self._finish("stop" if matched else reason)

    def _finish(self, reason: FinishReason) -> None:
        # A token that a stop string cuts in two is kept; those after it are dropped.
        cut = self._matcher.matched is not None
        self._tokens.extend(t for t in self._held if not cut or t.offset < self._shown)
        self._held.clear()
        if self._options.suffix:
            self._text.append(self._options.suffix)
        if self._parser is not None:
            self._parser.finish(cut=reason != "stop")
            if self._parser.num_calls and reason == "stop":
                reason = "tool_calls"
        self.finish_reason = reason

    def _echo(self, logprobs: Sequence[TokenLogprob | None] | None) -> None:
        """Show the prompt as far as these log probabilities reach; they may arrive in parts."""
        prompt, end = self._prompt, len(self._prompt.text)
        if self._options.logprobs and logprobs is not None:
            ids = prompt.ids[self._echoed : self._echoed + len(logprobs)]
            for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True), self._echoed):
                size = 0 if i < prompt.added else len(self._echo_decoder.push(token))
                self._tokens.append(self._info(token, logprob, size))
                self._decoded += size
            self._echoed += len(ids)
            if self._echoed < len(prompt.ids):
                end = min(end, self._decoded)
        self._text.append(prompt.text[self._shown : end])
        self._shown = end
        if end == len(prompt.text) and self._echoed in (0, len(prompt.ids)):
            self._echoes = False
            self._decoded = end

    def _info(self, token: int, logprob: TokenLogprob | None, size: int) -> TokenInfo:
        top = logprob.top if logprob else ()
        named = self._named(token, logprob.logprob if logprob else None)
        return TokenInfo(
            named.name,
            named.bytes,
            named.logprob,
            self._decoded,
            self._decoded + size,
            tuple(self._named(other, value) for other, value in top),
        )

    def _named(self, token: int, logprob: float | None) -> NamedToken:
        spelled = self._tokenizer.token_bytes(token)
        try:
            name = spelled.decode()
        except UnicodeDecodeError:  # OpenAI's way to write a part of a character
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
        return NamedToken(name, spelled, logprob)
