"""Keys and limits in one SQLite file, which several processes of a machine may share."""

import dataclasses
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from server.keys.key import Key, Limits
from server.keys.store.store import (
    BUSY_SECONDS,
    DAY_SECONDS,
    LEASE_SECONDS,
    WINDOW_SECONDS,
    QuotaStatus,
    Refusal,
    Reservation,
    StoreError,
    Usage,
    UsageRow,
    refusal_of,
    token_wait,
)

_WAIT_SECONDS = 10.0
# A call is running until it is settled or its lease ends. It is kept as long as it runs or counts
# for the minute: ``tokens`` are what counts, ``prompt`` and ``completion`` what is charged if its
# server dies.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (
    id TEXT, field TEXT, value TEXT NOT NULL, PRIMARY KEY (id, field)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, at REAL NOT NULL, tokens INTEGER NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, model TEXT NOT NULL,
    running INTEGER NOT NULL, lease REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS calls_by_time ON calls (key, at, tokens);
CREATE INDEX IF NOT EXISTS running ON calls (key, lease) WHERE running;
CREATE TABLE IF NOT EXISTS usage (
    key TEXT, day INTEGER, model TEXT, requests INTEGER NOT NULL DEFAULT 0,
    prompt INTEGER NOT NULL DEFAULT 0, completion INTEGER NOT NULL DEFAULT 0,
    cached INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (key, day, model)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tickets (
    digest TEXT PRIMARY KEY, key TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tickets_by_key ON tickets (key, expires);
CREATE INDEX IF NOT EXISTS tickets_by_time ON tickets (expires);
"""
_CHARGE = """
INSERT INTO usage (key, day, model, requests, prompt, completion, cached)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key, day, model) DO UPDATE SET requests = requests + excluded.requests,
    prompt = prompt + excluded.prompt, completion = completion + excluded.completion,
    cached = cached + excluded.cached
"""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _telling(
    method: Callable[Concatenate["SqliteStore", Arguments], Result],
) -> Callable[Concatenate["SqliteStore", Arguments], Result]:
    """SQLite's errors as ours."""

    @wraps(method)
    def call(self: "SqliteStore", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the key database {self.path} cannot be used: {error}") from None

    return call


class SqliteStore:
    """A :class:`~server.keys.store.store.Store` in a file that only its owner may read."""

    threads = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def exists(self) -> bool:
        """See :class:`~server.keys.store.store.Store`, here and below."""
        return self.path.exists()

    @_telling
    def pepper(self) -> bytes:
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO meta VALUES ('pepper', ?)", (secrets.token_bytes(32),)
            )
            query = "SELECT value FROM meta WHERE name = 'pepper'"
            return bytes(database.execute(query).fetchone()[0])

    @_telling
    def has_keys(self) -> bool:
        with self._transaction(write=False) as database:
            return database.execute("SELECT 1 FROM keys LIMIT 1").fetchone() is not None

    @_telling
    def add_key(self, key: Key) -> None:
        rows = [(key.id, name, value) for name, value in key.to_fields().items()]
        with self._transaction() as database:
            database.executemany("INSERT INTO keys VALUES (?, ?, ?)", rows)

    @_telling
    def find_key(self, key_id: str) -> Key | None:
        with self._transaction(write=False) as database:
            rows = database.execute("SELECT field, value FROM keys WHERE id = ?", (key_id,))
            fields = dict(rows.fetchall())
        return Key.from_fields(key_id, fields) if fields else None

    @_telling
    def list_keys(self) -> list[Key]:
        found: dict[str, dict[str, str]] = {}
        with self._transaction(write=False) as database:
            for key_id, name, value in database.execute("SELECT id, field, value FROM keys"):
                found.setdefault(key_id, {})[name] = value
        keys = [Key.from_fields(key_id, fields) for key_id, fields in found.items()]
        return sorted(keys, key=lambda key: (key.created, key.id))

    @_telling
    def change_key(self, key_id: str, changes: Mapping[str, str]) -> None:
        with self._transaction() as database:
            database.executemany(
                "UPDATE keys SET value = ? WHERE id = ? AND field = ?",
                [(value, key_id, name) for name, value in changes.items()],
            )

    @_telling
    def reserve(
        self, key_id: str, limits: Limits, reservation: Reservation, now: float | None
    ) -> QuotaStatus:
        with self._transaction() as database:
            now = time.time() if now is None else now  # read under the lock: calls are in order
            _expire(database, now)
            database.execute(
                "DELETE FROM calls WHERE key = ? AND at <= ? AND NOT running",
                (key_id, now - WINDOW_SECONDS),
            )
            before = _quota_status_of(database, key_id, now)
            tokens = reservation.tokens(limits)
            if refusal := refusal_of(before, limits, tokens):
                retry = _retry_of(database, key_id, before, limits, tokens, refusal)
                return dataclasses.replace(before, refusal=refusal, retry=retry)
            database.execute(
                "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, TRUE, ?)",
                (
                    *(
                        reservation.id,
                        key_id,
                        now,
                        tokens,
                        reservation.prompt,
                        reservation.completion,
                        reservation.model,
                    ),
                    now + LEASE_SECONDS,
                ),
            )
            _charge(database, key_id, now, reservation.model, 1, Usage())
            return _quota_status_of(database, key_id, now)

    @_telling
    def settle(
        self, key_id: str, reservation_id: str, usage: Usage | None, now: float | None
    ) -> None:
        with self._transaction() as database:
            _expire(database, time.time() if now is None else now)
            row = database.execute(
                "SELECT at, model FROM calls WHERE id = ? AND key = ? AND running",
                (reservation_id, key_id),
            ).fetchone()
            if row is None:
                return
            if usage is None:
                database.execute("DELETE FROM calls WHERE id = ?", (reservation_id,))
                _charge(database, key_id, row[0], row[1], -1, Usage())
                return
            database.execute(
                "UPDATE calls SET running = FALSE, tokens = ? WHERE id = ?",
                (usage.prompt + usage.completion, reservation_id),
            )
            _charge(database, key_id, row[0], row[1], 0, usage)

    @_telling
    def renew(self, calls: Iterable[tuple[str, str]], now: float | None) -> None:
        now = time.time() if now is None else now
        with self._transaction() as database:
            _expire(database, now)
            database.executemany(
                "UPDATE calls SET lease = ? WHERE key = ? AND id = ? AND running",
                [(now + LEASE_SECONDS, key_id, reservation_id) for key_id, reservation_id in calls],
            )

    @_telling
    def quota_status(self, key_id: str, now: float | None) -> QuotaStatus:
        with self._transaction(write=False) as database:
            return _quota_status_of(database, key_id, time.time() if now is None else now)

    @_telling
    def sweep(self, now: float | None) -> None:
        now = time.time() if now is None else now
        with self._transaction() as database:
            _expire(database, now)
            database.execute("DELETE FROM tickets WHERE expires <= ?", (now,))

    @_telling
    def usage(self, key_id: str) -> list[UsageRow]:
        query = (
            "SELECT key, day, model, requests, prompt, completion, cached FROM usage "
            "WHERE key = ? AND requests > 0 ORDER BY day, model"
        )
        with self._transaction(write=False) as database:
            return [UsageRow(*row) for row in database.execute(query, (key_id,))]

    @_telling
    def add_ticket(
        self, ticket: str, key_id: str, now: float, expires: float, most: int
    ) -> float | None:
        query = "SELECT COUNT(*), MIN(expires) FROM tickets WHERE key = ?"
        with self._transaction() as database:
            database.execute("DELETE FROM tickets WHERE expires <= ?", (now,))
            count, first = database.execute(query, (key_id,)).fetchone()
            if count >= most:
                return float(first) - now
            database.execute("INSERT INTO tickets VALUES (?, ?, ?)", (ticket, key_id, expires))
        return None

    @_telling
    def take_ticket(self, ticket: str, now: float) -> str | None:
        query = "DELETE FROM tickets WHERE digest = ? RETURNING key, expires"
        with self._transaction() as database:
            row = database.execute(query, (ticket,)).fetchone()
        return row[0] if row and row[1] > now else None

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._connection is None:
                self._connection = _connect(self.path)
            database = self._connection
            # What writes takes the lock before it reads: nobody else acts on the same counts.
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    """The database at ``path``, made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # SQLite gives its side files the mode of this one. An existing file is not opened here: to
    # close it would end the locks of this process's other connections.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o600)
    database = sqlite3.connect(
        path, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database


def _charge(
    database: sqlite3.Connection, key: str, at: float, model: str, requests: int, usage: Usage
) -> None:
    """Add to the usage of the day on which a call was admitted."""
    amounts = (requests, usage.prompt, usage.completion, usage.cached)
    database.execute(_CHARGE, (key, int(at // DAY_SECONDS), model, *amounts))


def _expire(database: sqlite3.Connection, now: float) -> None:
    """End what nobody renewed, and charge it as reserved."""
    rows = database.execute(
        "UPDATE calls SET running = FALSE WHERE running AND lease <= ? "
        "RETURNING key, at, model, prompt, completion",
        (now,),
    ).fetchall()
    for key, at, model, prompt, completion in rows:
        _charge(database, key, at, model, 0, Usage(prompt=prompt, completion=completion))


def _quota_status_of(database: sqlite3.Connection, key: str, now: float) -> QuotaStatus:
    """How the key stands."""
    requests, tokens, newest = database.execute(
        "SELECT COUNT(*), COALESCE(SUM(tokens), 0), MAX(at) FROM calls WHERE key = ? AND at > ?",
        (key, now - WINDOW_SECONDS),
    ).fetchone()
    (running,) = database.execute(
        "SELECT COUNT(*) FROM calls WHERE key = ? AND running AND lease > ?", (key, now)
    ).fetchone()
    (day,) = database.execute(
        "SELECT COALESCE(SUM(requests), 0) FROM usage WHERE key = ? AND day = ?",
        (key, int(now // DAY_SECONDS)),
    ).fetchone()
    return QuotaStatus(
        now=now,
        requests=requests,
        tokens=tokens,
        day_requests=day,
        running=running,
        reset=now if newest is None else newest + WINDOW_SECONDS,
    )


def _retry_of(
    database: sqlite3.Connection,
    key: str,
    status: QuotaStatus,
    limits: Limits,
    tokens: int,
    refusal: Refusal,
) -> float:
    """Seconds until the limit that refused a call of so many tokens will admit it."""
    now = status.now
    if refusal == "day":
        return DAY_SECONDS - now % DAY_SECONDS
    if refusal == "concurrent":
        return BUSY_SECONDS
    calls = database.execute(
        "SELECT at, tokens FROM calls WHERE key = ? AND at > ? ORDER BY at",
        (key, now - WINDOW_SECONDS),
    ).fetchall()
    if refusal == "tokens":
        return token_wait(calls, status.tokens + tokens - (limits.tokens or 0), now)
    leaving = status.requests - (limits.requests or 0)  # this one must have left, oldest first
    return calls[leaving][0] + WINDOW_SECONDS - now if limits.requests else WINDOW_SECONDS
