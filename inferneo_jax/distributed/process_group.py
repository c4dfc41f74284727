"""The other processes of a job: exchanging values with them and announcing work to them."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import orjson

from inferneo_jax.distributed.transport import Channel, Kind
from inferneo_jax.errors import JobError

Callback = Callable[[str], None]
"""Receives the reason; called on a thread of the process group."""

DISSOLVE_SECONDS = 10.0
"""Maximum time that the leader of a failed job waits for the others to end first."""


def _nothing(_: object) -> None:
    """The default of ``dooms``: no values end the job."""


class ProcessGroup(Protocol):
    """What a model's runner needs from the processes that run the model together with it."""

    @property
    def leads(self) -> bool:
        """Whether this process is the leader, which decides what is run."""

    def exchange(
        self,
        what: str,
        mine: Any,
        seconds: float | None = None,
        *,
        dooms: Callable[[list[Any]], object] = _nothing,
    ) -> list[Any]:
        """Wait until all processes have called this, and return their values in order of number.

        Args:
            what: a name of the exchange, the same in all processes.
            mine: this process's value, which must be representable as JSON.
            seconds: maximum time to wait for the others; None: the job's ``load_seconds``.
            dooms: tells whether the values end the job. If so, the leader waits for the others to
                end, for a limited time, and their end does not count as a loss: JAX ends every
                process whose leader is gone at once, before it could report why it ends.

        Raises:
            JobError: a process is lost, is at another exchange, or does not arrive in time.
        """

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """Tell the others what to do; the leader calls this before it does the same itself.

        Raises:
            JobError: one of them is lost.
        """


class SingleProcess:
    """The process group of a single process."""

    leads = True

    def exchange(
        self,
        what: str,
        mine: Any,
        seconds: float | None = None,
        *,
        dooms: Callable[[list[Any]], object] = _nothing,
    ) -> list[Any]:
        """Return this process's own value."""
        del what, seconds, dooms
        return [mine]

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """Do nothing, as there are no other processes."""


def agree(processes: ProcessGroup, what: str, fields: Mapping[str, Any]) -> None:
    """Check that ``fields`` are equal in all processes.

    Raises:
        JobError: they differ; the error names the processes, fields and values. It is raised in
            every process.
    """

    def compare(found: list[Any]) -> list[str]:
        return [
            f"{name} is {theirs.get(name)!r} in process {number} and {leaders!r} in process 0"
            for number, theirs in enumerate(found)
            for name, leaders in found[0].items()
            if theirs.get(name) != leaders
        ]

    problems = compare(processes.exchange(what, dict(fields), dooms=compare))
    if problems:
        raise JobError(
            f"the processes of the job do not agree: {'; '.join(problems)}. Give all of them the "
            "same version, models and settings"
        )


class TcpProcessGroup:
    """The connections of this process to the others.

    One thread listens to each connection and another one sends heartbeats. Until the group is
    closed, the loss of any process is the loss of the job.

    Args:
        channels: the connections, by the number of the process at the other end.
        process_id: the number of this process; process 0 leads.
        beat_seconds: the time between two heartbeats.
        load_seconds: the default maximum wait of ``exchange``.
        on_lost: called once, when a process is lost.
        on_leave: called when a follower was told to end.
    """

    def __init__(
        self,
        channels: Mapping[int, Channel],
        *,
        process_id: int,
        beat_seconds: float,
        load_seconds: float,
        on_lost: Callback,
        on_leave: Callback = lambda _: None,
    ) -> None:
        self.leads = process_id == 0
        self._channels, self._process_id = dict(channels), process_id
        self._load_seconds = load_seconds
        self._on_lost, self._on_leave = on_lost, on_leave
        self._changed = threading.Condition()
        self._inbox: dict[int, deque[tuple[Kind, bytes]]] = {peer: deque() for peer in channels}
        self._lost: str | None = None
        self._gone: dict[int, str] = {}
        self._ending = False
        self._closed = threading.Event()
        for peer in channels:
            self._start(partial(self._listen, peer), f"process {peer}")
        self._start(partial(self._beat, beat_seconds), "beat")

    @property
    def lost(self) -> str | None:
        """The reason why the job cannot go on, or None while it can."""
        return self._lost

    def exchange(
        self,
        what: str,
        mine: Any,
        seconds: float | None = None,
        *,
        dooms: Callable[[list[Any]], object] = _nothing,
    ) -> list[Any]:
        """See :class:`ProcessGroup`."""
        seconds = self._load_seconds if seconds is None else seconds
        if self.leads:
            found = {0: orjson.loads(orjson.dumps(mine))}  # the value as the others receive it
            for peer in self._channels:
                found[peer] = self._value(peer, what, seconds)
            values = [found[number] for number in sorted(found)]
            doomed = bool(dooms(values))
            if doomed:
                with self._changed:
                    self._ending = True  # first: the others may be gone once they know
            self.announce(Kind.VALUE, orjson.dumps([what, values]))
            if doomed:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._gone.keys() >= self._channels.keys(), DISSOLVE_SECONDS
                    )
            return values
        self.announce(Kind.VALUE, orjson.dumps([what, mine]))
        values = self._value(0, what, seconds)
        assert isinstance(values, list)
        return values

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """See :class:`ProcessGroup`. A follower is connected to the leader only."""
        for peer, channel in self._channels.items():
            try:
                channel.send(kind, *parts)
            except JobError as error:
                self._lose(peer, str(error))
        if self._lost:
            raise JobError(self._lost)

    def next(self, peer: int = 0, seconds: float | None = None) -> tuple[Kind, bytes]:
        """Wait for the next frame of a process, other than its heartbeats.

        Args:
            peer: the number of the process.
            seconds: maximum time to wait for the frame; None: as long as the process lives.

        Raises:
            JobError: the process is lost, or took too long.
        """
        with self._changed:
            inbox = self._inbox[peer]
            if not self._changed.wait_for(
                lambda: inbox or peer in self._gone or self._lost, seconds
            ):
                raise JobError(f"process {peer} did not come along within {seconds:g} s")
            if inbox:
                return inbox.popleft()
            raise JobError(self._lost or self._gone[peer])

    def end(self, seconds: float) -> None:
        """Have all followers end in order, and wait until each has confirmed it.

        Raises:
            JobError: a follower is lost, or does not answer.
        """
        with self._changed:
            self._ending = True
        self.announce(Kind.STOP)
        for peer in self._channels:
            while self.next(peer, seconds)[0] != Kind.STOP:
                pass  # a frame that was sent before the follower was told to stop

    def close(self) -> None:
        """Close all connections. Idempotent."""
        with self._changed:
            self._ending = True
        self._closed.set()
        for channel in self._channels.values():
            channel.close()

    def _value(self, peer: int, what: str, seconds: float) -> Any:
        kind, payload = self.next(peer, seconds)
        if kind == Kind.STOP:
            raise JobError(f"process {peer} ended the job before it was ready")
        name, value = orjson.loads(payload) if kind == Kind.VALUE else (kind.name, None)
        if name != what:
            raise JobError(
                f"process {peer} is at {name!r} and process {self._process_id} at {what!r}"
            )
        return value

    def _listen(self, peer: int) -> None:
        while True:
            try:
                kind, payload = self._channels[peer].receive()
            except JobError as error:
                return self._lose(peer, str(error))
            if kind == Kind.FAILED:
                return self._lose(peer, f"failed: {payload.decode(errors='replace')}")
            if kind == Kind.LEAVE:
                self._on_leave(f"process {peer} was told to end")
            elif kind != Kind.BEAT:
                with self._changed:
                    self._ending = self._ending or kind == Kind.STOP
                    self._inbox[peer].append((kind, payload))
                    self._changed.notify_all()

    def _beat(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            with suppress(JobError):
                self.announce(Kind.BEAT)

    def _lose(self, peer: int, why: str) -> None:
        """Record that a process is gone, and that the job is lost unless it was ending anyway."""
        with self._changed:
            reason = f"process {peer} of the job {why}"
            first = not self._lost and not self._ending
            self._gone.setdefault(peer, reason)
            self._lost = reason if first else self._lost
            self._changed.notify_all()
        if first:
            self._on_lost(reason)

    def _start(self, work: Callable[[], None], name: str) -> None:
        threading.Thread(target=work, name=f"lockstep {name}", daemon=True).start()
