"""``configuration.md``: every setting, of the fields of ``Settings``."""

import inspect
import re
from collections.abc import Iterator

from server.reference.markdown import code, join, table
from server.reference.types import words
from server.settings import CONFIG_VARIABLE, PREFIX, Settings

_ABOUT = f"""# Settings

Each setting is a variable of the environment, or a key of the TOML file that `{CONFIG_VARIABLE}`
names; of both, the variable counts. Arrays are written with commas between, in TOML as arrays; an
object is `name=value` with commas between, in TOML a table. Another variable that begins with
`{PREFIX}` is named in the log at start."""
_HEADER = ("variable", "key in TOML", "type and bounds", "default", "meaning")


def configuration_page() -> str:
    """The page."""
    return join([_ABOUT, table(_HEADER, _rows())])


def _rows() -> Iterator[tuple[str, ...]]:
    described = Settings.model_json_schema()["properties"]
    documented = _documented(Settings)
    for name, field in Settings.model_fields.items():
        default = described[name].get("default")
        yield (
            f"`{PREFIX}{name.upper()}`",
            f"`{name}`",
            words(described[name], null=False).replace('"', ""),
            "" if default in (None, "", [], {}) else code(default).replace('"', ""),
            field.description or documented.get(name, ""),
        )


def _documented(schema: type[Settings]) -> dict[str, str]:
    """What a class's docstring says of its attributes."""
    text = (inspect.getdoc(schema) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, re.MULTILINE | re.DOTALL)
    return {name: " ".join(words.replace("``", "`").split()) for name, words in found}
