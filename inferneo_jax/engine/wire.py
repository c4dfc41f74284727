"""What an engine's process and the process that uses it tell each other.

Each message is a frame: a kind, and a payload in JSON, which keeps every float exactly. Vectors are
the only payload that is not JSON. Requests are known by numbers that the using process counts up.
What a step has brought for all requests travels in one frame, as far as it was there when the frame
before it had been sent.
"""

import enum
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson

from inferneo_jax import errors
from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.distributed.transport import Frames
from inferneo_jax.errors import InferneoError, JobError, RequestError
from inferneo_jax.request import (
    Constraint,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
)
from inferneo_jax.scheduler import sequence as sequences

_VECTORS = struct.Struct("!III")


class Message(enum.IntEnum):
    """The kind of a frame, with its payload."""

    LOAD = 1
    """To the engine: ``[model, path, name, config, draft path or null]``."""
    OBTAIN = 7
    """``[model, name, path of a source or null, folder of checkpoints]``."""
    JOB = 8
    """``[configuration]`` of the job that the engine's process leads; before any other message."""
    END = 9
    """``[]``: stop everything in order."""
    SUBMIT = 2
    """``[model, number, request]``."""
    CHANGE = 3
    """``[model, number, "abort", "pause" or "resume"]``."""
    EMBED = 4
    """``[model, number, texts, owner]``."""
    CANCEL = 5
    """``[model, number]``: nobody waits for these vectors any more."""
    STOP = 6
    """``[model]``."""
    PROGRESS = 16
    """From the engine: ``[model, stage, done, total]``."""
    LOADED = 17
    """``[model, description]``."""
    OBTAINED = 24
    """``[model, path]``."""
    FAILED = 18
    """``[model, number or null, error]``: a model cannot be had, or texts were not embedded."""
    OUTPUTS = 19
    """A list of ``[model, number, *output]``."""
    VECTORS = 20
    """Three integers: model, number and length of a vector; then float32, little-endian."""
    STATE = 21
    """``[state of each model, memory of each device]``, some times a second."""
    STOPPED = 22
    """``[model]``: all its outputs have been sent."""
    LOG = 23
    """``[level, logger, text]``."""
    LEAVE = 25
    """``[reason]``: another process of the job was told to end."""
    LOST = 26
    """``[reason]``: the job cannot go on."""


class Outbox:
    """Sends frames on a thread of its own, so that no other thread ever waits for the peer.

    Args:
        frames: the connection.
        on_lost: called on that thread when the peer is gone; what is left is dropped.
    """

    def __init__(self, frames: Frames[Message], on_lost: Callable[[], None]) -> None:
        self._frames, self._on_lost = frames, on_lost
        self._filled = threading.Condition()
        self._left: list[tuple[Message, Any]] = []
        threading.Thread(target=self._run, name="outbox", daemon=True).start()

    def put(self, kind: Message, payload: Any) -> None:
        """Send a message after all earlier ones; of OUTPUTS, the payload is one output.

        Thread-safe.
        """
        with self._filled:
            self._left.append((kind, payload))
            if len(self._left) == 1:
                self._filled.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._filled:
                    self._filled.wait_for(lambda: self._left)
                    left, self._left = self._left, []
                self._send(left)
        except JobError:
            self._on_lost()

    def _send(self, left: list[tuple[Message, Any]]) -> None:
        outputs = []
        for kind, payload in left:
            if kind == Message.OUTPUTS:
                outputs.append(payload)
                continue
            if outputs:
                self._frames.send(Message.OUTPUTS, pack(outputs))
                outputs = []
            self._frames.send(kind, payload if isinstance(payload, bytes) else pack(payload))
        if outputs:
            self._frames.send(Message.OUTPUTS, pack(outputs))


def pack(payload: Any) -> bytes:
    """Write a payload as JSON."""
    return orjson.dumps(payload, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return list(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, InferneoError):
        param = value.param if isinstance(value, RequestError) else None
        return [type(value).__name__, str(value), param]
    raise TypeError(type(value).__name__)


def read_error(fields: Sequence[Any]) -> InferneoError:
    """Make the same error again, without its cause."""
    name, text, param = fields
    kind = getattr(errors, name)
    return kind(text, param) if issubclass(kind, RequestError) else kind(text)


def read_config(fields: dict[str, Any]) -> EngineConfig:
    """Make the same configuration again."""
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return EngineConfig(**fields | lists | {"mesh": MeshShape(**fields["mesh"])})


def read_request(fields: dict[str, Any]) -> GenerationRequest:
    """Make the same request again."""
    sampling = fields["sampling"]
    bias = {int(token): value for token, value in sampling["logit_bias"].items()}
    constraint = fields["constraint"]
    made = {
        "prompt": tuple(fields["prompt"]),
        "sampling": SamplingParams(**sampling | {"logit_bias": bias}),
        "stop_token_ids": frozenset(fields["stop_token_ids"]),
        "cache_salt": bytes.fromhex(fields["cache_salt"]),
        "constraint": constraint and Constraint(**constraint),
    }
    return GenerationRequest(**fields | made)


def write_output(model: int, number: int, output: GenerationOutput, *, first: bool) -> list[Any]:
    """What a request's output says that the ones before it have not."""
    written: list[Any] = [model, number, output.token_ids]
    if first or output.finish_reason or output.logprobs is not None:
        written += [_scores(output.logprobs), output.finish_reason, output.error]
    if first:
        written += [output.cached_tokens, output.admitted_at, _scores(output.prompt_logprobs)]
    return written


def deliver(
    sequence: sequences.Sequence,
    tokens: list[int],
    scores: list[Any] | None = None,
    reason: FinishReason | None = None,
    error: Sequence[Any] | None = None,
    cached_tokens: int | None = None,
    admitted_at: float | None = None,
    prompt_scores: list[Any] | None = None,
) -> None:
    """Deliver an output as it was written to the sink of its request here."""
    if cached_tokens is not None:  # the first
        sequence.cached_tokens, sequence.admitted_at = cached_tokens, admitted_at
        sequence.prompt_logprobs = list(_read_scores(prompt_scores) or ())
        sequence.num_computed = len(sequence.request.prompt)
    sequence.num_sampled += len(tokens)
    logprobs: Any = _read_scores(scores)
    failure = read_error(error) if error else None
    sequence.deliver(tuple(tokens), logprobs, reason, failure)


def _scores(logprobs: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    if logprobs is None:
        return None
    return [each and [each.token_id, each.logprob, each.top] for each in logprobs]


def _read_scores(fields: list[Any] | None) -> tuple[TokenLogprob | None, ...] | None:
    """Log probabilities; JSON has no minus infinity, of which null is what is left."""
    if fields is None:
        return None
    return tuple(
        each
        and TokenLogprob(
            each[0], _number(each[1]), tuple((token, _number(value)) for token, value in each[2])
        )
        for each in fields
    )


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value


def write_vectors(model: int, number: int, vectors: "np.ndarray[Any, Any]") -> bytes:
    """Write vectors, float32 ``[texts, hidden_size]``."""
    head = _VECTORS.pack(model, number, vectors.shape[1])
    return head + vectors.astype("<f4").tobytes()


def read_vectors(payload: bytes) -> "tuple[int, int, np.ndarray[Any, np.dtype[np.float32]]]":
    """Read the model, the number of the request, and float32 ``[texts, hidden_size]``."""
    model, number, size = _VECTORS.unpack_from(payload)
    values = np.frombuffer(payload, "<f4", offset=_VECTORS.size)
    return model, number, values.reshape(-1, size).astype(np.float32)
