"""The tables of the SQLite store, and what is done to them within a transaction."""

import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

from server.keys.key import Limits
from server.keys.store.store import (
    BUSY_SECONDS,
    DAY_SECONDS,
    WINDOW_SECONDS,
    QuotaStatus,
    Refusal,
    Usage,
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


def connect(path: Path) -> sqlite3.Connection:
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


def charge(
    database: sqlite3.Connection, key: str, at: float, model: str, requests: int, usage: Usage
) -> None:
    """Add to the usage of the day on which a call was admitted."""
    amounts = (requests, usage.prompt, usage.completion, usage.cached)
    database.execute(_CHARGE, (key, int(at // DAY_SECONDS), model, *amounts))


def expire(database: sqlite3.Connection, now: float) -> None:
    """End what nobody renewed, and charge it as reserved."""
    rows = database.execute(
        "UPDATE calls SET running = FALSE WHERE running AND lease <= ? "
        "RETURNING key, at, model, prompt, completion",
        (now,),
    ).fetchall()
    for key, at, model, prompt, completion in rows:
        charge(database, key, at, model, 0, Usage(prompt=prompt, completion=completion))


def quota_status_of(database: sqlite3.Connection, key: str, now: float) -> QuotaStatus:
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


def retry_of(
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
