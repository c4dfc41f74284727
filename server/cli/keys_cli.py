"""``inferneo keys``: create, list, change and revoke API keys, and read their usage."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, get_args

import orjson
import typer
from rich.console import Console
from rich.table import Table

from inferneo_jax import ConfigError
from server.config.settings import Settings
from server.keys.key import SCOPES, Limits
from server.keys.keyring import Keyring, state_of
from server.keys.store.open import open_store
from server.keys.store.store import Store
from server.keys.usage import key_list, usage_of
from server.observe.terminal import escaped

app = typer.Typer(help="Make, list and end API keys.", no_args_is_help=True)

_WIDE = 1000
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_FIELDS = {
    "rpm": "requests",
    "tpm": "tokens",
    "rpd": "day_requests",
    "concurrent": "concurrent",
}

Database = Annotated[
    str | None,
    typer.Option(
        "--db", help="Path or Redis URL of the key database; by default INFERNEO_KEYS_DB."
    ),
]
Which = Annotated[str, typer.Argument(metavar="KEY", help="Id or name.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print what /admin answers over HTTP.")]
Rpm = Annotated[str | None, typer.Option(help="Requests a minute, or none.", metavar="N")]
Tpm = Annotated[str | None, typer.Option(help="Tokens a minute, or none.", metavar="N")]
Rpd = Annotated[str | None, typer.Option(help="Requests a day, or none.", metavar="N")]
Concurrent = Annotated[str | None, typer.Option(help="Requests at once, or none.", metavar="N")]


Column = Literal["date", "model", "requests", "prompt_tokens", "completion_tokens", "cached_tokens"]
"""The columns of the usage table, in order."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="For whom or what it is.", show_default=False)],
    scope: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated: {', '.join(SCOPES)}.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use, by default all; repeatable.")
    ] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    rpd: Rpd = None,
    concurrent: Concurrent = None,
    expires_in: Annotated[
        str | None, typer.Option(help="Such as 12h or 30d; by default never.", metavar="TIME")
    ] = None,
    db: Database = None,
) -> None:
    """Create a key. It is printed once, alone on the last line."""
    with _keyring(db) as keyring:
        key, text = keyring.create(
            name,
            scopes=scope,
            models=model or (),
            limits=_limits(Limits(), rpm=rpm, tpm=tpm, rpd=rpd, concurrent=concurrent),
            expires_in=None if expires_in is None else _duration(expires_in),
        )
    _print(f"Key {key.id} ({name}). This is the only time it is shown:")
    print(text)


@app.command("list")
def list_keys(db: Database = None, as_json: Json = False) -> None:
    """List the keys. The keys themselves cannot be read again."""
    table = _table("id", "name", "state", "scopes", "models", *_FIELDS, "expires")
    with _store(db) as store:
        keys = Keyring(store).all()
        if as_json:
            _print_json(key_list(store, keys))
            return
    for key in keys:
        limits = [_shown(getattr(key.limits, field)) for field in _FIELDS.values()]
        scopes, models = ", ".join(sorted(key.scopes)), escaped(", ".join(key.models)) or "all"
        name, state, expires = escaped(key.name), state_of(key), _date(key.expires)
        table.add_row(key.id, name, state, scopes, models, *limits, expires)
    _print(table)


@app.command()
def revoke(which: Which, db: Database = None) -> None:
    """Revoke a key permanently; servers notice within a second."""
    with _keyring(db) as keyring:
        key = keyring.revoke(keyring.find(which))
    _print(f"{key.id}: revoked")


@app.command()
def rotate(which: Which, db: Database = None) -> None:
    """Replace a key with a new one of the same name, rights, limits and usage; the old one ends."""
    with _keyring(db) as keyring:
        key = keyring.find(which)
        text = keyring.rotate(key)
    _print(f"Key {key.id} ({escaped(key.name)}). This is the only time it is shown:")
    print(text)


@app.command()
def limits(
    which: Which,
    rpm: Rpm = None,
    tpm: Tpm = None,
    rpd: Rpd = None,
    concurrent: Concurrent = None,
    db: Database = None,
) -> None:
    """Change the given limits, and show all limits."""
    with _keyring(db) as keyring:
        key = keyring.find(which)
        found = _limits(key.limits, rpm=rpm, tpm=tpm, rpd=rpd, concurrent=concurrent)
        if found != key.limits:
            keyring.change(key, limits=found)
    table = Table(box=None, show_header=False)
    for option, field in _FIELDS.items():
        table.add_row(option, _shown(getattr(found, field)))
    _print(table)


@app.command()
def usage(
    which: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Id or name.")] = None,
    db: Database = None,
    as_json: Json = False,
) -> None:
    """Show the usage of keys by day (UTC) and model."""
    columns: tuple[Column, ...] = get_args(Column)
    with _store(db) as store:
        store.sweep(None)
        keyring = Keyring(store)
        found = usage_of(store, keyring.all() if which is None else [keyring.find(which)])
    if as_json:
        _print_json(found)
        return
    table = _table("id", "name", *(name.replace("_", " ") for name in columns))
    for row in found["data"]:
        table.add_row(row["key"], escaped(row["name"]), *(str(row[name]) for name in columns))
    _print(table)


def _table(*names: str) -> Table:
    table = Table(box=None)
    for name in names:
        table.add_column(name, no_wrap=name == "id")
    return table


def _print(what: object) -> None:
    """Print to fit a terminal; elsewhere, where a program may read it, print everything.

    Names are printed literally: brackets and colons in them are not markup.
    """
    width = None if sys.stdout.isatty() else _WIDE
    console = Console(width=width, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(what)


def _print_json(what: object) -> None:
    print(orjson.dumps(what, option=orjson.OPT_INDENT_2).decode())


@contextmanager
def _store(db: str | None) -> Iterator[Store]:
    settings = Settings.load()
    store = (
        open_store(settings.keys_location(), settings.named("keys_db"))
        if db is None
        else open_store(db, "--db")
    )
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _keyring(db: str | None) -> Iterator[Keyring]:
    with _store(db) as store:
        yield Keyring(store)


def _limits(before: Limits, **options: str | None) -> Limits:
    values = {field: getattr(before, field) for field in _FIELDS.values()}
    for option, text in options.items():
        if text is None:
            continue
        if text.lower() == "none":
            values[_FIELDS[option]] = None
        elif re.fullmatch(r"[0-9]{1,12}", text) and int(text) > 0:
            values[_FIELDS[option]] = int(text)
        else:
            raise ConfigError(f"--{option} is {text!r}; it must be a whole number above 0, or none")
    return Limits(**values)


def _duration(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--expires-in is {text!r}; write a number and s, m, h, d or w, as in 30d"
        )
    return float(int(match[1]) * _SECONDS[match[2]])


def _shown(limit: int | None) -> str:
    return "none" if limit is None else f"{limit:,}"


def _date(moment: float | None) -> str:
    if moment is None:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
