"""Prompts are computed by one engine and continued by another: keys and values are handed over.

A prefill engine computes a prompt as it does any other, and sends the pages of its full blocks.
They become cached blocks of the decode engine, which then serves the request like any other whose
prefix it has cached: it computes what is left of the last page, and decodes. So the scheduler and
the programs know nothing of it, and what cannot be had is computed.

Both sides prove that they know a token (``distributed/transport.py``), and compare what must be
equal for pages to mean the same. Nothing but numbers and arrays of known shapes is sent.
"""

import enum
import itertools
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np
import orjson

from inferneo_jax.config import HandoverConfig
from inferneo_jax.distributed.transport import Channel, Frames
from inferneo_jax.engine.engine import Engine
from inferneo_jax.engine.served import GenerationEngine
from inferneo_jax.engine.wire import pack, read_error
from inferneo_jax.errors import (
    ConfigError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    InferneoError,
    JobError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.layers.cache import KVCache
from inferneo_jax.request import (
    EngineStats,
    GenerationOutput,
    GenerationRequest,
    OutputSink,
    SamplingParams,
)
from inferneo_jax.scheduler.sequence import prompt_hashes

log = logging.getLogger(__name__)

_SHAKE_SECONDS = 10.0
_STRANGERS = 32
"""Maximum number of connections that are in their handshake at once."""
_RETRY_SECONDS = 1.0
_PAGES = struct.Struct("!III")
_AT_ONCE = 4
"""Pieces of a prompt that are copied before they are sent: what they take of the device is bounded,
however long it is."""
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Seconds of silence, seconds between probes, and their number: a lost host is noticed in 11 s."""


class Handed(enum.IntEnum):
    """The kind of a frame, with its payload."""

    ENGINE = 1
    """From the prefill engine, first: what both must have in common, a JSON object."""
    PREFILL = 2
    """To it: JSON, ``[number, prompt, salt, priority, owner]``."""
    CANCEL = 3
    """To it: JSON, ``[number]``; nobody waits for this prompt any more."""
    PAGES = 4
    """From it: three integers, the number of the request, its first block and the number of blocks;
    then the arrays of one piece, one after the other."""
    DONE = 5
    """From it: JSON, ``[number]``; all pages that it has have been sent."""
    FAILED = 6
    """From it: JSON, ``[number, error]``."""


class Pieces:
    """Writes and reads pieces of the cache as bytes. Kinds and shapes are known to both sides.

    Args:
        engine: whose cache it is.
        identity: what else both engines must have in common, such as the model.

    Attributes:
        block_len: tokens of a block.
        blocks: number of blocks of a piece.
        common: what both engines must have in common.
    """

    def __init__(self, engine: Engine, identity: Mapping[str, str]) -> None:
        self.block_len = engine.stats().page_len
        self.blocks, shapes = engine.prepare_handover()
        self._leaves, self._structure = jax.tree.flatten(shapes)
        shape = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in self._leaves)
        self.common = {**identity, "cache": shape}

    def write(self, piece: KVCache) -> list[memoryview]:
        """The arrays of a piece; waits until the device has computed them."""
        arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(piece)]
        return [array.reshape(-1).view(np.uint8).data for array in arrays]

    def read(self, payload: memoryview) -> KVCache:
        """A piece, put on the device here: the engine's thread has no time for copies.

        Raises:
            JobError: it is none of this cache.
        """
        if len(payload) != (size := sum(leaf.size * leaf.dtype.itemsize for leaf in self._leaves)):
            raise JobError(f"sent a piece of {len(payload)} bytes; it must have {size}")
        arrays, start = [], 0
        for leaf in self._leaves:
            array: Any = np.ndarray(leaf.shape, leaf.dtype, payload, start)
            arrays.append(jax.device_put(array, leaf.sharding))
            start += array.nbytes
        piece: KVCache = jax.tree.unflatten(self._structure, arrays)
        return piece

    def check(self, theirs: Mapping[str, str]) -> None:
        """Compare what the other engine says of itself.

        Raises:
            JobError: pages would mean something else there; the text names what differs.
        """
        for name, mine in self.common.items():
            if theirs.get(name) != mine:
                raise JobError(
                    f"has {name} {theirs.get(name)!r}, and this engine {mine!r}; give both the "
                    "same version, model and settings"
                )


def hand_over(
    engine: Engine, config: HandoverConfig, identity: Mapping[str, str]
) -> GenerationEngine:
    """Make an engine compute prompts for others, or have others compute its own.

    Args:
        engine: that has served no request yet.
        config: which of both, and where.
        identity: what both engines must have in common, such as the model.

    Returns:
        The engine to submit requests to.

    Raises:
        ConfigError: nobody can listen at the address, or engines of this kind hand nothing over.
    """
    if config.listen is None:
        addresses = [config.address(text) for text in config.servers]
        return DecodeEngine(engine, addresses, config.token, identity)
    try:
        host, port = config.address(config.listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"prompts cannot be computed for others at {config.listen}: "
            f"{error.strerror or error}; a server does so for one language model, at an address "
            "of its own"
        ) from error
    PrefillServer(engine, listener, config.token, identity)
    return engine


class PrefillServer:
    """Computes the prompts of decode engines. Also serves requests of its own, if there are any.

    Args:
        engine: that computes.
        listener: a listening TCP socket, which is closed at the end.
        token: that decode engines must know.
        identity: what they must have in common with this engine, such as the model.
    """

    def __init__(
        self, engine: Engine, listener: socket.socket, token: str, identity: Mapping[str, str]
    ) -> None:
        self._engine, self._listener, self._token = engine, listener, token
        self._pieces = Pieces(engine, identity)
        self._strangers = threading.Semaphore(_STRANGERS)
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="prefill", daemon=True).start()

    def close(self) -> None:
        """Accept no more decode engines."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            self._strangers.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or there are too many files
                self._strangers.release()
                self._closed.wait(_RETRY_SECONDS)
                continue
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Serve one decode engine until it is gone."""
        with connection:
            try:
                frames = self._shake(connection)
            except (JobError, OSError) as error:
                log.warning("a decode engine was refused: it %s", error)
                return
            finally:
                self._strangers.release()
            _Prompts(self._engine, self._pieces, frames).run()

    def _shake(self, connection: socket.socket) -> Frames[Handed]:
        channel = Channel(connection, _SHAKE_SECONDS)
        channel.challenge(self._token)
        channel.welcome()
        frames = _frames(connection)
        frames.send(Handed.ENGINE, pack(self._pieces.common))
        return frames


class _Prompts:
    """The prompts of one decode engine."""

    def __init__(self, engine: Engine, pieces: Pieces, frames: Frames[Handed]) -> None:
        self._engine, self._pieces, self._frames = engine, pieces, frames
        self._prefix = secrets.token_hex(8)  # ids of several decode engines are not to meet
        self._computed: SimpleQueue[tuple[GenerationRequest, GenerationOutput] | None]
        self._computed = SimpleQueue()
        self._live: dict[str, int] = {}

    def run(self) -> None:
        """Compute what is asked for, until the connection ends; then forget what is left."""
        sender = threading.Thread(target=self._send, name="pages", daemon=True)
        sender.start()
        try:
            while True:
                kind, payload = self._frames.receive()
                number, *rest = orjson.loads(payload)
                if kind == Handed.PREFILL:
                    self._prefill(number, *rest)
                elif kind == Handed.CANCEL:
                    self._engine.abort(self._id(number))
                else:
                    raise JobError(f"sent {kind.name}, which only a prefill engine sends")
        except (JobError, ValueError, TypeError) as error:
            log.info("a decode engine is gone: it %s", error)
        finally:
            for each in list(self._live):
                self._engine.abort(each)
            self._frames.close()
            self._computed.put(None)

    def _id(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    def _prefill(
        self, number: int, prompt: list[int], salt: str, priority: int, owner: str
    ) -> None:
        request = GenerationRequest(
            id=self._id(number),
            prompt=tuple(prompt),
            max_tokens=0,
            sampling=SamplingParams(temperature=0.0),
            cache_salt=bytes.fromhex(salt),
            priority=priority,
            owner=owner,
        )
        self._live[request.id] = number

        def sink(output: GenerationOutput) -> None:
            if output.finish_reason:
                self._computed.put((request, output))

        try:
            self._engine.submit(request, sink)
        except (EngineError, RequestError) as error:
            output = GenerationOutput(finish_reason="error", error=_as_engine_error(error))
            self._computed.put((request, output))

    def _send(self) -> None:
        """Send what has been computed, one prompt after the other."""
        with suppress(JobError):  # it is gone, which the other thread notices too
            while (computed := self._computed.get()) is not None:
                request, output = computed
                number = self._live.pop(request.id, None)
                if number is None or output.finish_reason == "abort":
                    continue
                try:
                    if output.error:
                        raise output.error
                    self._send_pages(number, request)
                except JobError:
                    raise
                except Exception as error:  # noqa: BLE001  (a failed step, of whatever kind)
                    self._frames.send(Handed.FAILED, pack([number, _as_engine_error(error)]))

    def _send_pages(self, number: int, request: GenerationRequest) -> None:
        hashes = prompt_hashes(request, self._pieces.block_len)
        start, copied = 0, 1
        while copied:
            copied, pieces = self._engine.read_prefix(hashes, start, _AT_ONCE).result()
            end = start + copied
            for piece in pieces:
                count = min(self._pieces.blocks, end - start)
                head = _PAGES.pack(number, start, count)
                self._frames.send(Handed.PAGES, head, *self._pieces.write(piece))
                start += count
        self._frames.send(Handed.DONE, pack([number]))


def _as_engine_error(error: Exception) -> EngineError:
    """What a request ends with; only our own errors are told in full."""
    if isinstance(error, EngineError):
        return error
    said = str(error) if isinstance(error, InferneoError) else type(error).__name__
    return EngineFailedError(f"its prompt was not computed: {said}")


@dataclass(slots=True)
class _Waiting:
    """A request whose prompt another engine computes."""

    request: GenerationRequest
    sink: OutputSink
    number: int
    hashes: list[bytes] = field(default_factory=list)
    paused: bool = False


class DecodeEngine:
    """An engine whose prompts other engines compute; it is used like an ``Engine``. Thread-safe.

    A request goes to the prefill engine that has the fewest of its prompts to compute. If that one
    is lost the request ends with an error, and no other is touched.

    Args:
        engine: that decodes.
        addresses: host and port of each prefill engine. They may be started later.
        token: that they know.
        identity: what they must have in common with this engine, such as the model.
    """

    def __init__(
        self,
        engine: Engine,
        addresses: Sequence[tuple[str, int]],
        token: str,
        identity: Mapping[str, str],
    ) -> None:
        self._engine = engine
        pieces = Pieces(engine, identity)
        self._block_len = pieces.block_len
        self._lock = threading.Lock()
        self._peers = [
            _Peer(address, token, engine, pieces, self._lock, self._computed)
            for address in addresses
        ]
        self._numbers = itertools.count()

    def submit(self, request: GenerationRequest, sink: OutputSink) -> None:
        """As ``Engine.submit``.

        Raises:
            OverloadedError: no prefill engine is connected.
        """
        self._engine.limits.check(request)
        # Scores of a prompt come from computing it, and of a short one there is nothing to send.
        if request.prompt_logprobs is not None or len(request.prompt) <= self._block_len:
            self._engine.submit(request, sink)
            return
        if error := self._engine.end:
            raise error
        with self._lock:
            if any(request.id in peer.waiting for peer in self._peers):
                raise RequestError(f"a request with id {request.id} is already under way", "id")
            connected = [peer for peer in self._peers if peer.frames]
            if not connected:
                raise OverloadedError("no prefill engine is connected; try again in a few seconds")
            peer = min(connected, key=lambda each: len(each.waiting))
            waiting = _Waiting(request, sink, next(self._numbers) % 2**32)
            peer.waiting[request.id] = waiting
        fields = [request.prompt, request.cache_salt, request.priority, request.owner]
        peer.send(Handed.PREFILL, [waiting.number, *fields])

    def abort(self, request_id: str) -> None:
        """As ``Engine.abort``."""
        with self._lock:
            found = [(peer, peer.waiting.pop(request_id, None)) for peer in self._peers]
        for peer, waiting in found:
            if waiting:
                peer.send(Handed.CANCEL, [waiting.number])
                waiting.sink(GenerationOutput(finish_reason="abort"))
                return
        self._engine.abort(request_id)

    def pause(self, request_id: str) -> None:
        """As ``Engine.pause``."""
        self._set_paused(request_id, paused=True)

    def resume(self, request_id: str) -> None:
        """As ``Engine.resume``."""
        self._set_paused(request_id, paused=False)

    def forecast(self, requests: list[GenerationRequest]) -> float | None:
        """As ``Engine.forecast``, for the decode engine alone."""
        return self._engine.forecast(requests)

    def stats(self) -> EngineStats:
        """As ``Engine.stats``.

        Prompts that are computed elsewhere count as waiting. It is ready while somebody can
        compute them.
        """
        stats = self._engine.stats()
        elsewhere = sum(len(peer.waiting) for peer in self._peers)
        ready = stats.ready and any(peer.frames for peer in self._peers)
        return replace(stats, waiting=stats.waiting + elsewhere, ready=ready)

    def stuck(self) -> float:
        """As ``Engine.stuck``."""
        return self._engine.stuck()

    def ended(self) -> bool:
        """As ``Engine.ended``."""
        return self._engine.ended()

    def stop(self) -> None:
        """As ``Engine.stop``."""
        self.disconnect()
        self._engine.stop()

    def disconnect(self) -> None:
        """Leave all prefill engines for good; requests whose prompts they compute get an error."""
        for peer in self._peers:
            peer.stop()

    def _set_paused(self, request_id: str, *, paused: bool) -> None:
        with self._lock:
            for peer in self._peers:
                if waiting := peer.waiting.get(request_id):
                    waiting.paused = paused
                    return
        (self._engine.pause if paused else self._engine.resume)(request_id)

    def _computed(self, waiting: _Waiting, failure: EngineError | None) -> None:
        """A prompt has been computed, or cannot be. Called on a peer's thread."""
        request, sink = waiting.request, waiting.sink
        with self._lock:  # so that what is asked of it meanwhile finds it here or there
            for peer in self._peers:
                if peer.waiting.get(request.id) is waiting:
                    del peer.waiting[request.id]
                    break
            else:
                return  # it was aborted
            try:
                if failure:
                    raise failure
                self._engine.submit(request, sink)
                if waiting.paused:
                    self._engine.pause(request.id)
            except (EngineError, RequestError) as error:
                told = _as_engine_error(error)
            else:
                return
        sink(GenerationOutput(finish_reason="error", error=told))


class _Peer:
    """The connection to one prefill engine, made again whenever it is lost.

    Args:
        address: host and port.
        token: that it knows.
        engine: that decodes.
        pieces: of its cache.
        lock: under which ``frames`` and ``waiting`` are changed.
        computed: called with each request once its prompt is cached, or with why it cannot be.

    Attributes:
        frames: the connection; None while there is none.
        waiting: requests that it computes, by id; none is added without a connection.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        engine: Engine,
        pieces: Pieces,
        lock: threading.Lock,
        computed: Callable[[_Waiting, EngineError | None], None],
    ) -> None:
        self.frames: Frames[Handed] | None = None
        self.waiting: dict[str, _Waiting] = {}
        self._address, self._token = address, token
        self._engine, self._pieces = engine, pieces
        self._lock, self._computed = lock, computed
        self._outbox: SimpleQueue[tuple[Handed, list[Any]] | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._said = ""
        self._name = "prefill engine at {}:{}".format(*address)
        threading.Thread(target=self._run, name="handover", daemon=True).start()

    def send(self, kind: Handed, payload: list[Any]) -> None:
        """Send a message on a thread of its own; whoever calls this never waits for the peer."""
        self._outbox.put((kind, payload))

    def stop(self) -> None:
        """Close the connection; all that wait get an error."""
        self._stopped.set()
        if frames := self.frames:
            frames.close()
        self._give_up(EngineStoppedError("the engine was stopped"))

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with socket.create_connection(self._address, _SHAKE_SECONDS) as connection:
                    self._shake(connection)
                    self._receive()
            except Exception as error:  # noqa: BLE001  (whatever is wrong with it, others go on)
                if (reason := str(error)) != self._said:
                    log.warning("the %s: %s", self._name, reason)
                self._said = reason
            finally:
                with self._lock:
                    self.frames = None
                self._outbox.put(None)
                ended = EngineFailedError(f"the {self._name} was lost while it computed the prompt")
                self._give_up(ended)
            self._stopped.wait(_RETRY_SECONDS)

    def _shake(self, connection: socket.socket) -> None:
        try:
            Channel(connection, _SHAKE_SECONDS).prove(self._token, 0)
        except JobError as error:
            raise JobError("refused this engine; both must have the same token") from error
        frames: Frames[Handed] = Frames(connection, Handed, _SHAKE_SECONDS)
        kind, payload = frames.receive()
        if kind != Handed.ENGINE:
            raise JobError("does not speak the protocol of this version")
        self._pieces.check(orjson.loads(payload))
        self._outbox = SimpleQueue()
        self.frames = frames = _frames(connection)
        self._said = ""
        sender = threading.Thread(target=self._send, args=[frames, self._outbox], daemon=True)
        sender.start()
        log.info("connected to the %s", self._name)

    @staticmethod
    def _send(
        frames: Frames[Handed], outbox: "SimpleQueue[tuple[Handed, list[Any]] | None]"
    ) -> None:
        """Send what is put into the outbox, until the connection is lost."""
        with suppress(JobError):  # noticed by the thread that receives, too
            while (message := outbox.get()) is not None:
                kind, payload = message
                frames.send(kind, pack(payload))

    def _receive(self) -> None:
        assert self.frames
        while True:
            kind, payload = self.frames.receive()
            if kind == Handed.PAGES:
                number, start, count = _PAGES.unpack_from(payload)
                if waiting := self._find(number):
                    self._write(waiting, start, count, memoryview(payload)[_PAGES.size :])
                continue
            number, *said = orjson.loads(payload)
            if not (waiting := self._find(number)):
                continue  # it was aborted
            if kind == Handed.DONE:
                self._computed(waiting, None)
            elif kind == Handed.FAILED:
                self._computed(waiting, _as_engine_error(read_error(said[0])))
            else:
                raise JobError(f"sent {kind.name}, which only a decode engine sends")

    def _write(self, waiting: _Waiting, start: int, count: int, payload: memoryview) -> None:
        waiting.hashes = waiting.hashes or prompt_hashes(waiting.request, self._pieces.block_len)
        most = len(waiting.hashes)
        if not 0 < count <= self._pieces.blocks or start + count > most:
            raise JobError(f"sent {count} blocks from block {start} of a prompt of {most}")
        piece = self._pieces.read(payload)
        with suppress(EngineError):  # which the request itself will meet
            self._engine.write_prefix(waiting.hashes, start, count, piece)

    def _find(self, number: int) -> _Waiting | None:
        return next((each for each in list(self.waiting.values()) if each.number == number), None)

    def _give_up(self, error: EngineError) -> None:
        for waiting in list(self.waiting.values()):
            self._computed(waiting, error)


def _frames(connection: socket.socket) -> Frames[Handed]:
    """The frames after the handshake, on a connection whose silent end is noticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if option := getattr(socket, name, None):  # Linux has them
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return Frames(connection, Handed)
