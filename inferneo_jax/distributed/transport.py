"""Frames over one TCP connection between two processes of a job.

A frame is a byte that says its kind, four bytes of length, and so many bytes. Nothing in it is
executed or unpickled. Whoever connects first proves that it knows the job's token, and then so does
the other side: each by an HMAC (RFC 2104) over random bytes of both, so that the token itself never
travels and nothing can be sent again later. What follows is neither encrypted nor signed.
"""

import enum
import hmac
import secrets
import socket
import struct
import threading
from contextlib import suppress

from inferneo_jax.errors import JobError

_HEADER = struct.Struct("!BI")
_NONCE = struct.Struct("!32s")
_HELLO = struct.Struct("!32sI32s")
_MOST = 2**28
"""Bytes of the largest frame of a process that proved itself."""


class Kind(enum.IntEnum):
    """What a frame is."""

    PROOF = 1
    """Part of the handshake."""
    BEAT = 2
    """Nothing but a sign of life."""
    VALUE = 3
    """JSON: what a process, or the leader for all, says in an exchange."""
    STEP = 4
    """The number of a program, and its arguments."""
    RESET = 5
    """Allocate the cache and the slots anew."""
    STOP = 6
    """The job ends in order."""
    LEAVE = 7
    """A follower was told to end."""
    FAILED = 8
    """A follower ends, for the reason in the text."""


class Channel:
    """One end of a connection. Any thread may send; one receives.

    Args:
        connection: a connected socket.
        seconds: a peer that sends nothing, or takes nothing, for so long is lost.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        connection.settimeout(seconds)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._seconds = connection, seconds
        self._sending = threading.Lock()

    def send(self, kind: Kind, *parts: bytes | memoryview) -> None:
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

    def receive(self, most: int = _MOST) -> tuple[Kind, bytes]:
        """The next frame, of at most so many bytes.

        Raises:
            JobError: the peer is lost, or does not speak this protocol.
        """
        try:
            code, size = _HEADER.unpack(self._read(_HEADER.size))
            if size > most or code not in list(Kind):
                raise JobError("does not speak the protocol of this version")
            return Kind(code), self._read(size)
        except TimeoutError:
            raise JobError(f"was not heard of for {self._seconds:g} s") from None
        except OSError as error:
            raise JobError(f"closed the connection ({error.strerror or error})") from None

    def close(self) -> None:
        """End the connection; whoever waits for a frame gets an error. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def prove(self, token: str, process_id: int) -> None:
        """A follower's side of the handshake.

        Raises:
            JobError: the other side does not know the token, or refuses this one.
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
        """The leader's side of the handshake, up to its own proof: the follower's number.

        Raises:
            JobError: it does not know the token.
        """
        mine = secrets.token_bytes(_NONCE.size)
        self.send(Kind.PROOF, mine)
        theirs, process_id, tag = _HELLO.unpack(self._proof(_HELLO.size))
        if not hmac.compare_digest(tag, _tag(token, b"follower", mine, theirs, process_id)):
            raise JobError("does not know the job's token")
        self._answer = _tag(token, b"leader", mine, theirs, process_id)
        return int(process_id)

    def welcome(self) -> None:
        """Send the leader's own proof: the follower is one of the job now."""
        self.send(Kind.PROOF, self._answer)

    def _proof(self, size: int) -> bytes:
        kind, payload = self.receive(most=size)
        if kind != Kind.PROOF or len(payload) != size:
            raise JobError("does not speak the protocol of this version")
        return payload

    def _read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            if not (count := self._socket.recv_into(view[done:])):
                raise JobError("closed the connection")
            done += count
        return bytes(data)


def _tag(token: str, side: bytes, leaders: bytes, followers: bytes, process_id: int) -> bytes:
    message = b"inferneo lockstep 1 " + side + leaders + followers + struct.pack("!I", process_id)
    return hmac.digest(token.encode(), message, "sha256")
