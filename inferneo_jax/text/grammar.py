"""Grammars that an output must match: how they are written, compiled and followed. No device.

The work is done by llguidance, which is imported when the first grammar is compiled. Grammars come
from strangers: their size, the work to compile them and the work of each step are bounded, and what
goes wrong is a ``ConstraintError`` of the request that brought it.

A server compiles a grammar to know whether it can; the engine compiles it again, or finds it among
those compiled last, and follows one request's output with a copy of it.
"""

import json
import math
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import orjson

from inferneo_jax.errors import ConstraintError, InferneoError
from inferneo_jax.files import one_line
from inferneo_jax.request import Constraint
from inferneo_jax.text.tokenizer import Tokenizer
from inferneo_jax.text.tokenizer_json import guarded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_BYTES = 2**18
"""Maximum size of a grammar, as llguidance serializes it."""
COMPILE_SECONDS = 5.0
"""Maximum time that a caller waits for a grammar to be compiled."""
_MAX_PARTS = 2**14
"""Maximum number of groups, rules and the like in a grammar: each may be nested in another, and
what reads and rewrites them is recursive."""
_STACK_BYTES = 2**27
_MAX_CONVERTED_RULES = 1000
"""Maximum number of rules in GBNF: the time to convert them grows with the square."""
_THREADS = 2
_MAX_KEPT, _MAX_KEPT_BYTES = 64, 2**22
"""Maximum number and total size of the grammars of which compiled forms are kept."""
_LIMITS = {
    "initial_lexer_fuel": 2_000_000,  # some 40 ms
    "step_lexer_fuel": 200_000,  # 15 ms
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 20_000,  # 1 to 2 KB each, for each request
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
_MAX_FORCED = 2**16
"""Up to this size, repetitions counted, a grammar may force tokens: it takes a second at most."""
_MAX_DEPTH = 100
"""How deep names may refer to names."""
_UNFORCED = '%llguidance {"no_forcing": true}'
_COUNTS = re.compile(r'(?:\{|~|min[A-Z][a-z]+\\*":)\s*(\d{1,9})')
_TEXTS = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//[^\n]*|#[^\n]*')
_HEAD = re.compile(r"^[?!]*([A-Za-z_][\w-]*)[^:\n]*:", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][\w-]*")
"""Of grammars in Lark: what is no name, where a rule begins, and names."""
_QUOTED = re.compile(r"^ *\d+ \|.*$", re.MULTILINE)
"""Lines of the grammar that an error of llguidance quotes."""
_COMPLETE = ("NoExtension", "EndOfSentence")
"""Why a matcher stops when the output matches."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""White space between two tokens of JSON: bounded, as small models may write nothing else."""


def json_schema_constraint(schema: dict[str, Any], *, lenient: bool = False) -> Constraint:
    """The constraint that the output is JSON that a schema describes.

    Args:
        schema: of draft 2020-12 or before. The order of ``properties`` is that of the output.
        lenient: whether keywords that cannot be enforced are ignored; otherwise they make the
            grammar invalid.

    Raises:
        ConstraintError: it is nested too deeply.
    """
    return _serialized({"json_schema": _with_options(schema, lenient)})


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The right side of a rule, in a grammar in Lark, that matches JSON that a schema describes.

    Args:
        schema: as :func:`json_schema_constraint` takes it.
        lenient: as there.

    Raises:
        ConstraintError: it is nested too deeply.
    """
    try:
        return "%json " + orjson.dumps(_with_options(schema, lenient)).decode()
    except TypeError as error:
        raise ConstraintError(f"the schema cannot be written as JSON: {one_line(error)}") from error


def _with_options(schema: Mapping[str, Any], lenient: bool) -> dict[str, Any]:
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE, "lenient": lenient}}


def json_object_constraint() -> Constraint:
    """The constraint that the output is a JSON object."""
    return json_schema_constraint({"type": "object"})


def regex_constraint(pattern: str) -> Constraint:
    """The constraint that the output matches a regular expression, from its beginning to its end.

    Args:
        pattern: in the syntax of Rust's ``regex``; it has no look-around and no back-references.
    """
    return Constraint(grammar=_library().LLMatcher.grammar_from_regex(pattern))


def choice_constraint(options: Sequence[str]) -> Constraint:
    """The constraint that the output is one of several texts."""
    return lark_constraint("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, options)))


def lark_constraint(grammar: str) -> Constraint:
    """The constraint that the output matches a grammar in llguidance's variant of Lark."""
    return _serialized({"lark_grammar": grammar})


def gbnf_constraint(grammar: str) -> Constraint:
    """The constraint that the output matches a grammar in GBNF, as llama.cpp has it, or in Lark.

    Raises:
        ConstraintError: it cannot be converted.
    """
    _check_size(grammar)
    if (rules := grammar.count("::=")) > _MAX_CONVERTED_RULES:
        raise ConstraintError(
            f"the grammar has {rules} rules; GBNF may have at most {_MAX_CONVERTED_RULES}"
        )
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return lark_constraint(any_to_lark(grammar))
    except RecursionError:
        raise ConstraintError("the grammar is nested too deeply") from None
    except Exception as error:  # it raises nothing more specific
        raise ConstraintError(f"the grammar is not valid GBNF: {one_line(error)}") from error


def _serialized(grammar: dict[str, Any]) -> Constraint:
    try:
        return Constraint(grammar=orjson.dumps({"grammars": [grammar]}).decode())
    except TypeError as error:
        raise ConstraintError(
            f"the grammar cannot be written as JSON: {one_line(error)}"
        ) from error


def _check_size(grammar: str) -> None:
    """Reject a grammar that is too large to be looked at.

    Raises:
        ConstraintError: it is.
    """
    if (size := len(grammar)) > MAX_GRAMMAR_BYTES:
        raise ConstraintError(
            f"the grammar has {size} characters; it may have at most {MAX_GRAMMAR_BYTES}"
        )
    if (parts := sum(map(grammar.count, "([~:"))) > _MAX_PARTS:
        raise ConstraintError(
            f"the grammar has {parts} groups, rules and fields; it may have at most {_MAX_PARTS}"
        )


def _checked(grammar: str) -> str:
    """The grammar as it is compiled, after what llguidance does not bound itself is bounded.

    What a grammar forces is spelled out, byte by byte, before anything else happens: it takes 20 us
    a byte. Where that could be much, nothing is forced, which changes the tokens and never the
    texts that are allowed.

    Raises:
        ConstraintError: it is too large, or not as llguidance serializes one.
    """
    _check_size(grammar)
    try:
        grammars = orjson.loads(grammar)["grammars"]
        entries = [dict(each) for each in grammars]
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
        raise ConstraintError("the grammar is not JSON that llguidance has serialized") from None
    size, repeats = float(len(grammar)), 1.0
    for count in _COUNTS.findall(grammar):
        repeats *= max(1, int(count))
    if "$ref" in grammar:  # what refers to itself may be forced without end
        size = math.inf
    for entry in entries:
        if isinstance(lark := entry.get("lark_grammar"), str):
            size += _expanded(lark)
    if size * repeats <= _MAX_FORCED:
        return grammar
    for entry in entries:
        lark, schema = entry.get("lark_grammar"), entry.pop("json_schema", None)
        if schema is not None:
            lark = f"start: %json {orjson.dumps(schema).decode()}"
        entry["lark_grammar"] = f"{_UNFORCED}\n{lark}"
    return orjson.dumps({"grammars": entries}).decode()


def _expanded(lark: str) -> float:
    """The size of a Lark grammar whose names are replaced by what they stand for.

    Infinite if they refer to themselves. Terminals are replaced when they are compiled.

    Raises:
        ConstraintError: its terminals would be too large.
    """
    bare = _TEXTS.sub(" ", lark)
    heads = list(_HEAD.finditer(bare))
    ends = [head.start() for head in heads[1:]] + [len(bare)]
    names = {head[1] for head in heads}
    bodies = {
        head[1]: [each for each in _NAME.findall(bare[head.end() : end]) if each in names]
        for head, end in zip(heads, ends, strict=True)
    }
    sizes: dict[str, float] = {}

    def size(name: str, depth: int) -> float:
        if depth > _MAX_DEPTH:
            return math.inf
        if name not in sizes:
            sizes[name] = math.inf  # while it is being computed, it would contain itself
            sizes[name] = 1 + sum(size(each, depth + 1) for each in bodies[name])
        return sizes[name]

    total = sum(size(name, 0) for name in bodies)
    if large := [name for name in bodies if name.isupper() and sizes[name] > _MAX_PARTS]:
        raise ConstraintError(
            f"the terminal {large[0][:50]} stands for more than {_MAX_PARTS} others, or for itself"
        )
    return total


@cache
def _library() -> Any:
    import llguidance

    return llguidance


class Matcher:
    """Follows the output of one request through its grammar. Not thread-safe.

    Attributes:
        error: why it cannot go on; None while it can.
    """

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self.error: ConstraintError | None = None

    def consume(self, token: int) -> bool:
        """Take the next token of the output; True if nothing may follow it."""
        if self.error:
            return False
        ended = False
        with self._noted():
            if not self._matcher.consume_token(token):
                self._note("it does not allow a token that was sampled")
            elif self._matcher.is_stopped():
                ended = self._ended()
        return ended

    def accepted(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one after the other, may come next."""
        if self.error:
            return 0
        count = 0
        with self._noted():
            count = self._matcher.validate_tokens(list(tokens))
        return 0 if self.error else count

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model says; often none."""
        if self.error:
            return []
        forced: list[int] = []
        with self._noted():
            forced = self._matcher.compute_ff_tokens()
        return [] if self.error else forced

    def check(self) -> None:
        """Note an error of the mask that was computed last."""
        with self._noted():
            if self._matcher.is_stopped():
                self._ended()

    def _ended(self) -> bool:
        """Whether the matcher stopped because the output is complete; notes why it did if not."""
        if not self._matcher.is_error() and self._matcher.stop_reason() in _COMPLETE:
            return True
        self._note(self._matcher.get_error() or self._matcher.stop_reason())
        return False

    def _note(self, reason: str) -> None:
        self.error = ConstraintError(f"the grammar cannot be followed further: {one_line(reason)}")

    @contextmanager
    def _noted(self) -> "Iterator[None]":
        """Notes what goes wrong in it instead of raising."""
        try:
            with guarded("the grammar cannot be followed further", ConstraintError):
                yield
        except ConstraintError as error:
            self.error = error


class ConstrainedRow(NamedTuple):
    """A row, or several that follow each other, of which a grammar says what they may sample.

    Attributes:
        matcher: has consumed all tokens before the first of them.
        place: of the first row.
        draft: of the tokens that may follow; each has a row of its own after the first.
    """

    matcher: Matcher
    place: int
    draft: tuple[int, ...] = ()


@cache
def _executor() -> Any:
    return _library().LLExecutor()


def fill_masks(
    rows: Iterable[ConstrainedRow], masks: "np.ndarray[Any, np.dtype[np.uint32]]"
) -> None:
    """Write which tokens each of the rows may sample, computed in several threads.

    A matcher that fails says so (``Matcher.error``); what it has written is of no use.

    Args:
        rows: the rows.
        masks: uint32 ``[rows, words]``, as many words as the vocabulary needs; rows that nothing
            is said about stay as they are.
    """
    plain: list[Any] = []
    drafted: list[Any] = []
    live = [row for row in rows if not row.matcher.error]
    for matcher, place, draft in live:
        if draft:
            drafted.append((matcher._matcher, place, list(draft)))
        else:
            plain.append((matcher._matcher, place))
    count, words = masks.shape
    target = masks.ctypes.data, words * masks.itemsize, count
    try:
        with guarded("masks cannot be computed", ConstraintError):
            if plain:
                _executor().unsafe_compute_mask_ptr(plain, *target)
            if drafted:
                _executor().unsafe_compute_mask_ptr_with_draft_token(drafted, *target)
    except ConstraintError as error:
        for row in live:
            row.matcher.error = error
    for row in live:
        row.matcher.check()


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, end
        pieces = tokenizer.pieces(skip_special_tokens=False)
        self.tokens = [*pieces[:size], *[b""] * (size - len(pieces))]
        self.bos_token_id = tokenizer.bos_token_id
        # They are no text: a grammar may only name them.
        self.special_token_ids = [index for index in sorted(tokenizer.marker_ids) if index < size]

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of a text, which must not raise."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except InferneoError:
            return []


class GrammarCompiler:
    """Compiles grammars for one model's tokenizer, and keeps those it compiled last. Thread-safe.

    Args:
        tokenizer: of the model.
        mask_words: words of a mask, of 32 tokens each.
    """

    def __init__(self, tokenizer: Tokenizer, mask_words: int) -> None:
        self._tokenizer, self._mask_words = tokenizer, mask_words
        self._trie: LLTokenizer | None = None
        self._making, self._lock = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._started = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """A compiler for a tokenizer alone, where no masks are computed."""
        return cls(tokenizer, -(-tokenizer.vocab_size // 32))

    def compile(self, constraint: Constraint) -> Matcher:
        """A matcher that has consumed nothing. Blocks.

        Raises:
            ConstraintError: the grammar is invalid or too complex; the message says where and why.
        """
        try:
            return self.submit(constraint).result(COMPILE_SECONDS)
        except TimeoutError:
            raise ConstraintError(
                f"the grammar was not compiled within {COMPILE_SECONDS:.0f} s; make it smaller"
            ) from None

    def submit(self, constraint: Constraint) -> "Future[Matcher]":
        """As ``compile``, in another thread."""
        future: Future[Matcher] = Future()

        def work() -> None:
            try:
                future.set_result(self._copy(constraint.grammar))
            except Exception as error:  # noqa: BLE001  (whoever waits for it handles it)
                future.set_exception(error)

        self._start()
        self._work.put(work)
        return future

    def _start(self) -> None:
        """Start the threads, with stacks for whatever is nested in a grammar."""
        with self._lock:
            if self._started:
                return
            self._started = True
            usual = threading.stack_size(_STACK_BYTES)
            try:
                for _ in range(_THREADS):
                    threading.Thread(target=self._run, name="grammars", daemon=True).start()
            finally:
                threading.stack_size(usual)

    def _run(self) -> None:
        while True:
            self._work.get()()

    def _copy(self, grammar: str) -> Matcher:
        with guarded("the grammar cannot be compiled", ConstraintError):
            return Matcher(self._compiled(grammar).deep_copy())

    def _compiled(self, grammar: str) -> "LLMatcher":
        with self._lock:
            if kept := self._kept.get(grammar):
                self._kept.move_to_end(grammar)
                return kept
        checked, library = _checked(grammar), _library()
        limits = library.LLParserLimits(**_LIMITS)
        made: LLMatcher = library.LLMatcher(self._vocabulary(), checked, log_level=0, limits=limits)
        if made.is_error():
            reason = one_line(_QUOTED.sub("", made.get_error()))
            raise ConstraintError(f"the grammar is not supported: {reason}")
        with self._lock:
            self._kept[grammar] = made
            while len(self._kept) > _MAX_KEPT or sum(map(len, self._kept)) > _MAX_KEPT_BYTES:
                self._kept.popitem(last=False)
        return made

    def _vocabulary(self) -> "LLTokenizer":
        """The vocabulary as a trie: made once, in about a second."""
        with self._making:
            if self._trie is None:
                size = 32 * self._mask_words
                ends = [index for index in sorted(self._tokenizer.eos_token_ids) if index < size]
                if not ends:
                    raise ConstraintError("the model has no end token, which a grammar needs")
                vocabulary = _Vocabulary(self._tokenizer, size, ends[0])
                self._trie = _library().LLTokenizer(vocabulary, eos_token=ends)
            return self._trie
