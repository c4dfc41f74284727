"""``configuration.md``: every setting, generated from the schema of settings."""

import itertools
import re
from collections.abc import Iterator

from server.cli.reference.markdown import join, table
from server.config.replica_settings import ReplicaSettings
from server.config.schema import SettingDoc, setting_docs

_ABOUT = """# Settings

Every setting can be given in three ways; of several, the first counts:

1. as an option of `inferneo serve`: `--max-len 4096`;
2. as a variable of the environment: `INFERNEO_MAX_LEN=4096`;
3. as a key of a TOML file, which `--config` or `INFERNEO_CONFIG` names: `max_len = 4096`. Lists are
   TOML's arrays there, and pairs a table.

A key is written as its option, with `_` for `-`; settings without an option have their key below.
A wrong value, or a key that is none, ends the start with a sentence that names it; a variable that
begins with `INFERNEO_` and is none is named in the log. `hypercorn server.app:app` reads variables
and the file."""


def configuration_page() -> str:
    """Return the text of the page."""
    groups = itertools.groupby(setting_docs(ReplicaSettings), lambda setting: setting.group)
    return join([_ABOUT, *(part for _, found in groups for part in _group(list(found)))])


def _group(settings: list[SettingDoc]) -> Iterator[str]:
    first = settings[0]
    yield f"## {first.group}"
    about = re.sub(r"docs/([\w-]+\.md)", r"[\1](../\1)", first.about)
    yield f"{about[:1].upper()}{about[1:]}"
    yield table(("setting", "value", "default", "meaning"), map(_row, settings))


def _row(setting: SettingDoc) -> tuple[str, ...]:
    other = setting.flag or setting.name
    bounds = f", {setting.bounds}" if setting.bounds else ""
    return (
        f"`{setting.variable}`<br>`{other}`",
        f"`{setting.form}`{bounds}",
        setting.default,
        setting.description,
    )
