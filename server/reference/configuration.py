"""``configuration.md``: every setting, of the fields of ``Settings``."""

from server.reference.markdown import code, join, table
from server.reference.types import words
from server.settings import CONFIG_VARIABLE, PREFIX, Settings

_ABOUT = f"""# Settings

Each setting is a variable of the environment, or a key of the TOML file that `{CONFIG_VARIABLE}` names; a variable goes before
the file. Lists are written with commas between, in TOML as arrays; `INFERNEO_ALIASES` is a table there. A variable that begins with
`{PREFIX}` and is none of these is named in the log at start.
"""


def configuration_page() -> str:
    """The page."""
    schema = Settings.model_json_schema()["properties"]
    rows = []
    for name, field in Settings.model_fields.items():
        described = schema[name]
        default = described.get("default")
        rows.append(
            (
                f"`{PREFIX}{name.upper()}`",
                f"`{name}`",
                words(described, null=False),
                "" if default in (None, "", [], {}) else code(default).replace('"', ""),
                field.description or "",
            )
        )
    header = ("variable", "key in TOML", "type and bounds", "default", "meaning")
    return join([_ABOUT, table(header, rows)])
