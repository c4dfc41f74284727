"""Keys and limits in one SQLite file, which several processes of a machine may share."""

import dataclasses
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from server.keys.key import Key, Limits
from server.keys.store.sqlite_tables import charge, connect, expire, quota_status_of, retry_of
from server.keys.store.store import (
    LEASE_SECONDS,
    WINDOW_SECONDS,
    QuotaStatus,
    Reservation,
    StoreError,
    Usage,
    UsageRow,
    refusal_of,
)

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
            expire(database, now)
            database.execute(
                "DELETE FROM calls WHERE key = ? AND at <= ? AND NOT running",
                (key_id, now - WINDOW_SECONDS),
            )
            before = quota_status_of(database, key_id, now)
            tokens = reservation.tokens(limits)
            if refusal := refusal_of(before, limits, tokens):
                retry = retry_of(database, key_id, before, limits, tokens, refusal)
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
            charge(database, key_id, now, reservation.model, 1, Usage())
            return quota_status_of(database, key_id, now)

    @_telling
    def settle(
        self, key_id: str, reservation_id: str, usage: Usage | None, now: float | None
    ) -> None:
        with self._transaction() as database:
            expire(database, time.time() if now is None else now)
            row = database.execute(
                "SELECT at, model FROM calls WHERE id = ? AND key = ? AND running",
                (reservation_id, key_id),
            ).fetchone()
            if row is None:
                return
            if usage is None:
                database.execute("DELETE FROM calls WHERE id = ?", (reservation_id,))
                charge(database, key_id, row[0], row[1], -1, Usage())
                return
            database.execute(
                "UPDATE calls SET running = FALSE, tokens = ? WHERE id = ?",
                (usage.prompt + usage.completion, reservation_id),
            )
            charge(database, key_id, row[0], row[1], 0, usage)

    @_telling
    def renew(self, calls: Iterable[tuple[str, str]], now: float | None) -> None:
        now = time.time() if now is None else now
        with self._transaction() as database:
            expire(database, now)
            database.executemany(
                "UPDATE calls SET lease = ? WHERE key = ? AND id = ? AND running",
                [(now + LEASE_SECONDS, key_id, reservation_id) for key_id, reservation_id in calls],
            )

    @_telling
    def quota_status(self, key_id: str, now: float | None) -> QuotaStatus:
        with self._transaction(write=False) as database:
            return quota_status_of(database, key_id, time.time() if now is None else now)

    @_telling
    def sweep(self, now: float | None) -> None:
        now = time.time() if now is None else now
        with self._transaction() as database:
            expire(database, now)
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
                self._connection = connect(self.path)
            database = self._connection
            # What writes takes the lock before it reads: nobody else acts on the same counts.
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
