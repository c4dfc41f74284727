"""Joins and leaves a job, which is a group of processes that run one model together."""

import logging
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from inferneo_jax.config import JobConfig
from inferneo_jax.distributed.process_group import Callback, TcpProcessGroup, agree
from inferneo_jax.distributed.transport import Channel, Kind
from inferneo_jax.errors import ConfigError, JobError
from inferneo_jax.platform.flags import set_flags
from inferneo_jax.version import __version__

log = logging.getLogger(__name__)

# JAX monitors the processes as well, but on a loss it aborts this one with a page of text. It only
# serves as a fallback for our own monitoring, so its timeouts are longer.
_JAX_HEARTBEAT_SECONDS = 100
_JAX_EXTRA_SECONDS = 60
_PORT_KEY = "inferneo/lockstep/port"
_STRANGERS = 32
"""Maximum number of connections that are in their handshake at once."""


class Job:
    """One process of a job. Creating it is cheap and imports no jax; only ``join`` takes long.

    Args:
        config: the configuration of the job.
        leads: whether this process is the leader, process 0, which decides what is run.
        on_leave: called on the leader when a follower was told to end, with a sentence that says
            so.
    """

    def __init__(
        self, config: JobConfig, *, leads: bool, on_leave: Callback = lambda _: None
    ) -> None:
        self.leads = leads
        self._config = config
        self._on_leave = on_leave
        self._on_lost: list[Callback] = []
        self._processes: TcpProcessGroup | None = None
        self._lost: str | None = None
        self._ended = False
        self._model: str | None = None
        self._lock = threading.Lock()

    @property
    def lost(self) -> str | None:
        """The reason why the job cannot go on, or None while it can. Thread-safe."""
        return self._lost

    @property
    def processes(self) -> TcpProcessGroup:
        """The connections to the other processes; available after ``join``."""
        assert self._processes, "join() comes first"
        return self._processes

    def on_lost(self, callback: Callback) -> None:
        """Register a callback for the loss of the job; it is called at once if that has happened.

        It may be called on any thread.
        """
        with self._lock:
            self._on_lost.append(callback)
            lost = self._lost
        if lost:
            callback(lost)

    def join(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        """Find the other processes and connect to them; later calls do nothing.

        The call blocks and initializes the devices.

        Raises:
            JobError: the other processes did not join in time, they differ from this one in what
                must be equal, or this process has the wrong number for its role.
        """
        if self._processes:
            return
        _check_number(self.leads, self._config.process_id)
        progress("joining", 0, 0)
        seconds = self._config.join_seconds
        late = f"the processes of the job did not all start within {seconds:g} s"
        watch = threading.Timer(seconds, self._lose, [late])
        watch.daemon = True
        watch.start()
        set_flags()
        coordinator, client = _initialize(self._config)
        watch.cancel()
        import jax

        number, count = jax.process_index(), jax.process_count()
        _check_number(self.leads, number)
        host = coordinator.rpartition(":")[0].strip("[]")
        seconds = self._config.connect_seconds
        if self.leads:
            with _listen(host) as listener:
                client.key_value_set(_PORT_KEY, str(listener.getsockname()[1]))
                channels = accept(listener, self._config, count - 1)
        else:
            port = int(client.blocking_key_value_get(_PORT_KEY, int(seconds * 1000)))
            channels = {0: connect(host, port, self._config, number)}
        self._processes = TcpProcessGroup(
            channels,
            process_id=number,
            beat_seconds=self._config.beat_seconds,
            load_seconds=self._config.load_seconds,
            on_lost=self._lose,
            on_leave=self._on_leave,
        )
        log.info("joined a job of %d processes as number %d", count, number)
        agree(self._processes, "process", _nature())

    def take(self, model: str) -> None:
        """Reserve the job's devices for a model.

        Raises:
            ConfigError: another model has reserved them.
        """
        if self._model is not None:
            raise ConfigError(
                f"a job of several processes runs one language model: {self._model} or {model}"
            )
        self._model = model

    def leave(self) -> None:
        """Tell the leader that this follower has to end; the leader then ends the job."""
        if self._processes:
            with suppress(JobError):
                self._processes.announce(Kind.LEAVE)

    def fail(self, reason: str) -> None:
        """Tell the leader why this follower ends."""
        if self._processes:
            with suppress(JobError):
                self._processes.announce(Kind.FAILED, reason.encode()[:1000])

    def end(self) -> None:
        """Leave the job in order; a leader ends the followers first.

        The call is idempotent and blocks for a bounded time.
        """
        with self._lock:
            if self._ended or not self._processes:
                return
            self._ended = True
        try:
            if self.leads:
                self._processes.end(self._config.end_seconds)
            else:
                self._processes.announce(Kind.STOP)
        except JobError as error:
            log.warning("the job did not end in order: %s", error)
        else:
            import jax

            jax.distributed.shutdown()  # waits until all processes have called it
        self._processes.close()

    def _lose(self, reason: str) -> None:
        log.error("%s; the job is lost", reason)
        with self._lock:
            self._lost = reason
            callbacks = list(self._on_lost)
        for callback in callbacks:
            callback(reason)


def _check_number(leads: bool, number: int | None) -> None:
    if number is not None and leads != (number == 0):
        raise JobError(
            f"this is process {number} of the job; process 0 is the one that serves HTTP, and all "
            "others run `inferneo follow`"
        )


def _nature() -> dict[str, object]:
    """The properties that must be equal in all processes of a job.

    Processes with the same version but different sources could run different programs, or the same
    programs in a different order, and would wait for each other forever.
    """
    import jax

    from inferneo_jax.platform.source import source_hash

    return {
        "version": __version__,
        "source of inferneo_jax": source_hash()[:12],
        "jax": jax.__version__,
        "platform": jax.devices()[0].platform,
        "devices": [device.device_kind for device in jax.devices()],
        "byte order": sys.byteorder,
    }


def _initialize(config: JobConfig) -> tuple[str, Any]:
    """Initialize ``jax.distributed``; return the address of its coordinator, and its client."""
    import jax

    # JAX has no public access yet to the address of the coordinator and the shared key-value store.
    from jax._src.distributed import global_state

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # This service would intercept SIGTERM, on which the server shuts down in order by itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if config.coordinator else None,
            initialization_timeout=int(config.join_seconds) + _JAX_EXTRA_SECONDS,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=int(config.end_seconds),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise JobError(
            f"the job's processes did not come together: {str(error).splitlines()[0]}"
        ) from error
    coordinator = global_state.coordinator_address
    assert coordinator is not None
    return coordinator, global_state.client


def _listen(host: str) -> socket.socket:
    """Listen on the coordinator's address, or on all addresses if it is not one of this host."""
    try:
        return socket.create_server((socket.gethostbyname(host), 0))
    except OSError:
        return socket.create_server(("", 0))


def connect(host: str, port: int, config: JobConfig, process_id: int) -> Channel:
    """Connect a follower to its leader.

    Raises:
        JobError: the leader cannot be reached, or rejects this process.
    """
    try:
        connection = socket.create_connection((host, port), config.connect_seconds)
    except OSError as error:
        raise JobError(f"the leader cannot be reached at {host}:{port}: {error}") from None
    channel = Channel(connection, config.lost_seconds)
    try:
        channel.prove(config.token, process_id)
    except JobError:
        channel.close()
        raise
    return channel


def accept(listener: socket.socket, config: JobConfig, count: int) -> dict[int, Channel]:
    """Accept the connections of all followers, numbers 1 to ``count``, and reject any others.

    Raises:
        JobError: a follower did not connect in time.
    """
    found: dict[int, Channel] = {}
    pending: set[Channel] = set()
    changed = threading.Condition()
    closed = False

    def welcome() -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                connection, address = listener.accept()
                channel = Channel(connection, config.lost_seconds)
                with changed:
                    if closed or len(pending) >= _STRANGERS:
                        channel.close()
                        continue
                    pending.add(channel)
                arguments = (channel, address[0])
                threading.Thread(target=admit, args=arguments, daemon=True).start()

    def admit(channel: Channel, address: str) -> None:
        try:
            number = channel.challenge(config.token)
            with changed:
                if closed or not 1 <= number <= count or number in found:
                    raise JobError(f"says that it is process {number}, which is not missing")
                channel.welcome()
                found[number] = channel
                pending.remove(channel)  # with the lock held: what is pending at the end is closed
        except JobError as error:
            if not closed:
                log.warning("refused a connection from %s, which %s", address, error)
            channel.close()
        finally:
            with changed:
                pending.discard(channel)
                changed.notify_all()

    threading.Thread(target=welcome, name="lockstep accept", daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(found) == count, config.connect_seconds)
        closed = True
        left = list(pending)
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
    for channel in left:
        channel.close()
    if missing := sorted(set(range(1, count + 1)) - found.keys()):
        for channel in found.values():
            channel.close()
        raise JobError(
            f"processes {missing} did not connect within {config.connect_seconds:g} s; see their "
            "logs: they need the same token, and a way to this host"
        )
    return found
