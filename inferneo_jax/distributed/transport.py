"""Frames over one connection between two processes.

A frame consists of one byte for its kind, four bytes for the length, and the payload. Nothing in it
is executed or unpickled. :class:`Frames` carries them over any connected socket.

A :class:`Channel` is a TCP connection of a job, and begins with a handshake: the connecting side
first proves that it knows the job's token, and then the other side does. Each proof is an HMAC (RFC
2104) over random bytes of both sides, so that the token itself is never sent and no proof can be
replayed. The frames that follow are neither encrypted nor signed.
"""

import enum
import hmac
import secrets
import socket
import struct
import threading
from contextlib import suppress
from typing import Generic, TypeVar

from inferneo_jax.errors import JobError

_HEADER = struct.Struct("!BI")
_NONCE = struct.Struct("!32s")
_HELLO = struct.Struct("!32sI32s")
_MOST = 2**28
"""Maximum number of bytes of a frame after the handshake."""


class Kind(enum.IntEnum):
    """The kind of a frame."""

    PROOF = 1
    """Part of the handshake."""
    BEAT = 2
    """A heartbeat without a payload."""
    VALUE = 3
    """JSON: a process's value in an exchange, or all values as sent by the leader."""
    STEP = 4
    """The number of a program and the arguments to run it with."""
    RESET = 5
    """Allocate the cache and the slots anew."""
    STOP = 6
    """The job ends in order."""
    LEAVE = 7
    """A follower was told to end."""
    FAILED = 8
    """A follower ends, for the reason in the text."""


K = TypeVar("K", bound=enum.IntEnum)
"""The kinds of frames of one protocol."""


class Frames(Generic[K]):
    """One end of a connection. Any thread may send; only one may receive.

    Args:
        connection: a connected socket.
        kinds: the kinds of frames.
        seconds: the time after which a peer that sends or accepts nothing counts as lost; None:
            it is lost once the connection is closed.
    """

    def __init__(
        self, connection: socket.socket, kinds: type[K], seconds: float | None = None
    ) -> None:
        connection.settimeout(seconds)
        self._socket, self._kinds, self._seconds = connection, kinds, seconds
        self._sending = threading.Lock()

    def send(self, kind: K, *parts: bytes | memoryview) -> None:
        """Send one frame.

        Raises:
            JobError: the peer is lost.
        """
        payload = b"".join(parts)
        try:
            with self._sending:
                self._socket.sendall(_HEADER.pack(kind, len(payload)) + payload)
        except TimeoutError:
            raise JobError(f"took nothing for {self._seconds:g} s") from None
        except OSError as error:
            raise JobError(f"closed the connection ({error.strerror or error})") from None

    def receive(self, most: int = _MOST) -> tuple[K, bytes]:
        """Receive the next frame, whose payload may have at most ``most`` bytes.

        Raises:
            JobError: the peer is lost, or does not follow this protocol.
        """
        try:
            code, size = _HEADER.unpack(self._read(_HEADER.size))
            if size > most or code not in self._kinds._value2member_map_:
                raise JobError("does not speak the protocol of this version")
            return self._kinds(code), self._read(size)
        except TimeoutError:
            raise JobError(f"was not heard of for {self._seconds:g} s") from None
        except OSError as error:
            raise JobError(f"closed the connection ({error.strerror or error})") from None

    def close(self) -> None:
        """Close the connection; a thread that waits for a frame gets an error. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes."""
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            if not (count := self._socket.recv_into(view[done:])):
                raise JobError("closed the connection")
            done += count
        return bytes(data)


class Channel(Frames[Kind]):
    """One end of a connection of a job.

    Args:
        connection: a connected TCP socket.
        seconds: the time after which a peer that sends or accepts nothing counts as lost.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        super().__init__(connection, Kind, seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prove(self, token: str, process_id: int) -> None:
        """Perform the follower's side of the handshake.

        Raises:
            JobError: the other side does not know the token, or rejects this process.
        """
        mine = secrets.token_bytes(_NONCE.size)
        try:
            (theirs,) = _NONCE.unpack(self._proof(_NONCE.size))
            tag = _tag(token, b"follower", theirs, mine, process_id)
            self.send(Kind.PROOF, _HELLO.pack(mine, process_id, tag))
            answer = self._proof(32)
        except JobError as error:
            raise JobError(
                f"the leader refused this process: it {error}. The job's token must be the same on "
                "all hosts, and each process must have a number of its own"
            ) from None
        if not hmac.compare_digest(answer, _tag(token, b"leader", theirs, mine, process_id)):
            raise JobError("the leader does not know the job's token; it must be the same on all")

    def challenge(self, token: str) -> int:
        """Perform the leader's side of the handshake except for its own proof.

        Returns:
            The follower's number.

        Raises:
            JobError: the follower does not know the token.
        """
        mine = secrets.token_bytes(_NONCE.size)
        self.send(Kind.PROOF, mine)
        theirs, process_id, tag = _HELLO.unpack(self._proof(_HELLO.size))
        if not hmac.compare_digest(tag, _tag(token, b"follower", mine, theirs, process_id)):
            raise JobError("does not know the job's token")
        self._answer = _tag(token, b"leader", mine, theirs, process_id)
        return int(process_id)

    def welcome(self) -> None:
        """Send the leader's own proof, which makes the follower a member of the job."""
        self.send(Kind.PROOF, self._answer)

    def _proof(self, size: int) -> bytes:
        kind, payload = self.receive(most=size)
        if kind != Kind.PROOF or len(payload) != size:
            raise JobError("does not speak the protocol of this version")
        return payload


def _tag(token: str, side: bytes, leaders: bytes, followers: bytes, process_id: int) -> bytes:
    message = b"inferneo lockstep 1 " + side + leaders + followers + struct.pack("!I", process_id)
    return hmac.digest(token.encode(), message, "sha256")
