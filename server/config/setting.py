"""Every setting as a person sees it, taken from the schema."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from server.config.schema import Schema

PREFIX = "INFERNEO_"
KEY_VARIABLE = PREFIX + "API_KEY"
"""The key that `inferneo chat` sends: no setting of a server."""
_NO_FLAG = ("models", "job_token")
"""The first is the argument of `inferneo serve`; the second everybody could read in `ps`."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: the key in TOML, and in Python.
        group: what it belongs to, as a title.
        about: a sentence on the group.
        description: sentences on the setting.
        form: how a value is written: ``N``, ``SECONDS``, ``auto|json``.
        bounds: of a number, as ``1 to 256``; empty: none.
        default: as it would be written, or, with ``default_in_words``, what happens without one.
        variable: the environment variable.
        flag: the option of `inferneo serve`; None: it has none.
    """

    name: str
    group: str
    about: str
    description: str
    form: str
    bounds: str
    default: str
    default_in_words: bool
    variable: str
    flag: str | None


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def flag_of(name: str) -> str | None:
    """The option of `inferneo serve` for a setting; None: it has none."""
    if name in _NO_FLAG or name not in Schema.model_fields:
        return None
    return "--" + name.replace("_", "-")


def describe(schema: type[BaseModel] = Schema) -> Iterator[Setting]:
    """Every setting of a schema, group by group."""
    for name, field in schema.model_fields.items():
        group, about = _group(schema, name)
        extra: Any = field.json_schema_extra or {}
        words = extra.get("default")
        yield Setting(
            name=name,
            group=group,
            about=about,
            description=field.description or "",
            form=extra.get("form") or _form(field),
            bounds=_bounds(field),
            default=words or _written(field.default),
            default_in_words=words is not None,
            variable=variable_of(name),
            flag=flag_of(name),
        )


def _group(schema: type[BaseModel], name: str) -> tuple[str, str]:
    """Title and sentence of a setting's group: the docstring of the class that declares it."""
    home = [each for each in schema.mro() if name in getattr(each, "model_fields", ())][-1]
    title, _, about = (home.__doc__ or "").splitlines()[0].partition(": ")
    return title.rstrip("."), about


def _form(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    kinds = {int: "N", float: "SECONDS"}
    options = get_args(field.annotation) or (field.annotation,)
    return next((kinds[each] for each in options if each in kinds), "TEXT")


def _bounds(field: FieldInfo) -> str:
    found = {type(each): each for each in field.metadata}
    least, above, most = found.get(Ge), found.get(Gt), found.get(Le)
    if least and most:
        return f"{_written(least.ge)} to {_written(most.le)}"
    words = {
        "at least": least and least.ge,
        "above": above and above.gt,
        "at most": most and most.le,
    }
    return ", ".join(
        f"{word} {_written(bound)}" for word, bound in words.items() if bound is not None
    )


def _written(value: Any) -> str:
    """As it would be typed."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
