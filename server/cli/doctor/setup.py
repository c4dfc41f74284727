"""Checks of the setup: settings, models, compiled programs, keys, and the port."""

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inferneo_jax import ConfigError, InferneoError
from inferneo_jax.platform.trusted import distrust
from inferneo_jax.weights.catalog import checkpoint_path, load_catalog, look
from server.cli.doctor.finding import Finding, State, existing, in_bytes, size_of
from server.config.settings import Settings, unknown_variables
from server.keys.key import Key
from server.keys.keyring import state_of
from server.keys.store.open import open_store
from server.keys.store.store import StoreError
from server.models.sources import Source, draft_source, sources_of
from server.process.listening import Listener, is_local, listen, url_of

_STALE_SECONDS = 30 * 86_400.0  # as in runner/compile_cache.py, which imports jax
_OTHERS_READ = 0o077


def settings(flags: dict[str, Any]) -> tuple[Settings | None, list[Finding]]:
    """Read and check the settings; None if they are invalid."""
    found = [
        Finding("Settings", "warning", sentence, f"unset {sentence.split()[0]}")
        for sentence in unknown_variables()
        if " is not a setting" in sentence
    ]
    try:
        read = Settings.load(flags)
        sources_of(read), draft_source(read)
    except InferneoError as error:
        problems = [Finding("Settings", "problem", line) for line in str(error).splitlines()]
        return None, [*problems, *found]
    where = f", with {read.config}" if read.config else ""
    changed = len(read.model_fields_set - {"config"})
    text = f"{changed} of {len(Settings.model_fields)} are set{where}"
    return read, [*found, Finding("Settings", "ok", text)]


def models(read: Settings) -> Iterator[tuple[Finding, int, int]]:
    """Check each model to serve; yield its weights' bytes, and the bytes still to be downloaded."""
    drafter = draft_source(read)
    for source in [*sources_of(read), *([drafter] if drafter else [])]:
        yield _model(source, read)


def _model(source: Source, read: Settings) -> tuple[Finding, int, int]:
    name = source.id
    try:
        folder = source.path or checkpoint_path(read.checkpoints_dir(), name)
        if folder.exists():
            info, size = look(folder), size_of(folder)
            kind = "chat" if info.kind == "decoder" else "embeddings"
            return Finding("Model", "ok", f"{name} is sound: {kind}, {in_bytes(size)}"), size, 0
    except InferneoError as error:
        again = None if source.path else f"inferneo rm {name} && inferneo pull {name}"
        return Finding("Model", "problem", f"{name}: {error}", again), 0, 0
    entry = load_catalog().get(name)
    if entry is None and "/" not in name:
        text = f"{name} is neither converted nor in the catalog, which has"
        text += f" {', '.join(load_catalog())}"
        return Finding("Model", "problem", text, "inferneo list"), 0, 0
    size = entry.size if entry else 0
    text = f"{name} is not here yet; the start fetches it" + (f", {in_bytes(size)}" if size else "")
    return Finding("Model", "warning", text, f"inferneo pull {name}"), size, size


def compiled(read: Settings) -> Iterator[Finding]:
    """Check the folder of compiled programs and encoded weights."""
    name, folder = "Compiled", Path(read.engine_config().compilation_cache or "")
    place = existing(folder)
    if not os.access(place, os.W_OK):
        text = f"{folder} cannot be written to: every start compiles all programs"
        yield Finding(name, "warning", text, "choose another with INFERNEO_COMPILATION_CACHE")
        return
    if place != folder:
        yield Finding(name, "ok", f"{folder} is made at the first start, which takes a minute")
        return
    if why := distrust(folder.stat()):
        text = f"no program is loaded from {folder}, {why}: every start compiles all of them"
        yield Finding(name, "problem", text, "choose another with INFERNEO_COMPILATION_CACHE")
    ages = [time.time() - file.stat().st_mtime for file in folder.iterdir() if file.is_file()]
    stale = sum(age > _STALE_SECONDS for age in ages)
    text = f"{len(ages)} files of {in_bytes(size_of(folder))} at {folder}"
    if stale:
        text += f"; {stale} were not used for 30 days, and are removed at the next start"
    yield Finding(name, "ok", text)


def keys(read: Settings) -> Iterator[Finding]:
    """Check the key store, and whether its keys fit the other settings."""
    location = read.keys_location()
    try:
        found = _keys_in(location)
    except (StoreError, ConfigError, sqlite3.Error, OSError, ValueError) as error:
        fix = f"look at {read.named('keys_db')}, or restore a backup (docs/operations.md)"
        yield Finding("Keys", "problem", f"{error}", fix)
        return
    active = sum(state_of(key) == "active" for key in found)
    text = f"{active} active of {len(found)}"
    make = "inferneo keys create NAME"
    if read.require_key == "false":
        state: State = "ok" if is_local(read.host) else "warning"
        text += f"; none is needed, so all who reach {read.host} are served"
        yield Finding(
            "Keys", state, text, None if state == "ok" else f"unset {read.named('require_key')}"
        )
    elif read.require_key == "true" and not active:
        yield Finding("Keys", "problem", f"{text}, and one is needed: nobody is served", make)
    elif not found and not is_local(read.host):
        yield Finding("Keys", "warning", "none, so other machines are refused", make)
    elif not found:
        yield Finding("Keys", "ok", "none yet, so only this machine is served, without one")
    elif not active:
        yield Finding("Keys", "warning", f"{text}: nobody is served", make)
    else:
        yield Finding("Keys", "ok", text)
    file = Path(location).expanduser()
    if "://" not in location and file.exists() and file.stat().st_mode & _OTHERS_READ:
        yield Finding("Keys", "warning", f"others may read {file}", f"chmod 600 {file}")


def _keys_in(location: str) -> list[Key]:
    """Return the keys of a store without changing it.

    Raises:
        StoreError, sqlite3.Error: the store cannot be reached, or is damaged.
    """
    if "://" in location:
        store = open_store(location)
        try:
            return store.list_keys()
        finally:
            store.close()
    file = Path(location).expanduser().absolute()
    if not file.exists():
        if not os.access(existing(file), os.W_OK):
            raise StoreError(f"{file} is not there and cannot be made")
        return []
    # If no process has it open, SQLite would leave the files of a write-ahead log behind.
    how = "mode=ro" if file.with_name(f"{file.name}-wal").exists() else "immutable=1"
    try:
        database = sqlite3.connect(f"{file.as_uri()}?{how}", uri=True, timeout=2)
        try:
            (whole,) = database.execute("PRAGMA quick_check").fetchone()
            if whole != "ok":
                raise StoreError(f"{file} is damaged ({whole})")
            fields: dict[str, dict[str, str]] = {}
            for key, name, value in database.execute("SELECT id, field, value FROM keys"):
                fields.setdefault(key, {})[name] = value
        finally:
            database.close()
    except sqlite3.Error as error:
        raise StoreError(f"{file} cannot be read: {error}") from None
    return [Key.from_fields(key, each) for key, each in fields.items()]


def port(read: Settings, there: Listener | None) -> Iterator[Finding]:
    """Check whether the server can listen on its address; ``there`` is who already does."""
    where = url_of(read.host, read.port)
    if there is None:
        try:
            listen(read).close()
        except ConfigError as error:
            yield Finding("Port", "problem", str(error))
        else:
            yield Finding("Port", "ok", f"{where} is free")
    elif there.status is None:
        text = f"{where} is taken by {there}"
        yield Finding("Port", "problem", text, "end that, or choose another with --port")
    elif there.status == "ready":
        yield Finding("Port", "ok", f"a server of ours is ready at {where}")
    else:
        state: State = "problem" if there.status == "failed" else "warning"
        yield Finding(
            "Port", state, f"a server of ours is {there.status} at {where}", f"curl {where}/ready"
        )
