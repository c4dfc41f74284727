"""The processes of a job, as one of them sees the others: what they agree on and announce."""

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
"""Told why; called on a thread of the process group."""

DISSOLVE_SECONDS = 10.0
"""How long the leader of a job that cannot be waits for the others to end before it does."""


def _nothing(_: object) -> None:
    """No values end the job."""


class ProcessGroup(Protocol):
    """What a model's runner needs of the processes that run it with this one."""

    @property
    def leads(self) -> bool:
        """Whether this process says what is run."""

    def exchange(
        self,
        what: str,
        mine: Any,
        seconds: float | None = None,
        *,
        dooms: Callable[[list[Any]], object] = _nothing,
    ) -> list[Any]:
        """Each process's value, by its number, once all have come here.

        Args:
            what: a name, the same in all.
            mine: anything that JSON can hold.
            seconds: how long to wait for the others; None: the job's ``load_seconds``.
            dooms: whether the values end the job. Then the others may be gone as soon as they have
                them, which is no loss.

        Raises:
            JobError: one is lost, is elsewhere, or does not come in time.
        """

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """Have the others do something, as the leader, before doing it here.

        Raises:
            JobError: one of them is lost.
        """

    def dissolve(self) -> None:
        """End a job that cannot be: the leader waits for the others to end, for a while.

        JAX ends every process at once whose leader is gone, so that it could not say why it ends.
        """


class SingleProcess:
    """The only process there is."""

    leads = True

    def exchange(
        self,
        what: str,
        mine: Any,
        seconds: float | None = None,
        *,
        dooms: Callable[[list[Any]], object] = _nothing,
    ) -> list[Any]:
        """Its own value."""
        del what, seconds, dooms
        return [mine]

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """There is nobody to tell."""

    def dissolve(self) -> None:
        """There is nobody to wait for."""


def agree(processes: ProcessGroup, what: str, fields: Mapping[str, Any]) -> None:
    """Compare what must be the same in all processes.

    Raises:
        JobError: it is not; names the processes, fields and values. Raised in each of them.
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
        processes.dissolve()
        raise JobError(
            f"the processes of the job do not agree: {'; '.join(problems)}. Give all of them the "
            "same version, models and settings"
        )


class TcpProcessGroup:
    """This process's connections to others, with a thread that listens to each and one that beats.

    To be closed; until then the loss of any of them is the loss of all.

    Args:
        channels: by the number of the process at the other end.
        process_id: of this one; 0 leads.
        beat_seconds: between two signs of life.
        load_seconds: the longest wait of ``exchange``.
        on_lost: called once, when a process is lost.
        on_leave: called when a follower is told to end.
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
        """Why the job cannot go on; None: it can."""
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
            found = {0: orjson.loads(orjson.dumps(mine))}  # as the others see it
            for peer in self._channels:
                found[peer] = self._value(peer, what, seconds)
            values = [found[number] for number in sorted(found)]
            if dooms(values):
                with self._changed:
                    self._ending = True
            self.announce(Kind.VALUE, orjson.dumps([what, values]))
            return values
        self.announce(Kind.VALUE, orjson.dumps([what, mine]))
        values = self._value(0, what, seconds)
        assert isinstance(values, list)
        return values

    def announce(self, kind: Kind, *parts: bytes | memoryview) -> None:
        """See :class:`ProcessGroup`. A follower has the leader only to tell."""
        for peer, channel in self._channels.items():
            try:
                channel.send(kind, *parts)
            except JobError as error:
                self._lose(peer, str(error))
        if self._lost:
            raise JobError(self._lost)

    def dissolve(self) -> None:
        """See :class:`ProcessGroup`."""
        if self.leads:
            with self._changed:
                self._ending = True
                self._changed.wait_for(
                    lambda: self._gone.keys() >= self._channels.keys(), DISSOLVE_SECONDS
                )

    def next(self, peer: int = 0, seconds: float | None = None) -> tuple[Kind, bytes]:
        """The next frame of a process, without its signs of life.

        Args:
            peer: the number of the process.
            seconds: how long to wait for it; None: as long as the process lives.

        Raises:
            JobError: it is lost, or took too long.
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
        """As the leader: have all others end in order, and wait until they are about to.

        Raises:
            JobError: one of them is lost, or does not answer.
        """
        with self._changed:
            self._ending = True
        self.announce(Kind.STOP)
        for peer in self._channels:
            while self.next(peer, seconds)[0] != Kind.STOP:
                pass  # what it said before it knew

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
        """Note that a process is gone, and with it the job, unless that was to end."""
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
