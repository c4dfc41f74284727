"""Command-line options, generated from the schema of settings."""

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import typer

from server.config.schema import SettingDoc, setting_docs


def with_flags(
    command: Callable[..., None], chosen: Collection[str] | None = None
) -> Callable[..., None]:
    """Give a command that takes a ``typer.Context`` the flags of all settings, or of some.

    Typer reads the flags from the command's signature.

    Args:
        command: its own parameters come first.
        chosen: the groups or names of settings; None: all.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    vars(command)["__signature__"] = inspect.Signature(
        [
            *(
                each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for each in own
                if each.kind is not inspect.Parameter.VAR_KEYWORD
            ),
            *_parameters(chosen),
        ]
    )
    return command


def given(context: typer.Context) -> dict[str, Any]:
    """Return the values of the given flags, by the names of the settings."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def _parameters(chosen: Collection[str] | None) -> Iterator[inspect.Parameter]:
    for setting in setting_docs():
        has_place = setting.flag or setting.name == "models"
        if has_place and (chosen is None or {setting.group, setting.name} & {*chosen}):
            yield _parameter(setting)


def _parameter(setting: SettingDoc) -> inspect.Parameter:
    """Return a setting as a parameter for Typer. Values are strings, which the schema validates."""
    bounds = f"From {setting.bounds}" if setting.bounds[:1].isdigit() else setting.bounds
    shared: dict[str, Any] = {
        "help": f"{setting.description} {bounds[:1].upper()}{bounds[1:]}."
        if bounds
        else setting.description,
        # Typer puts descriptions in parentheses, but not values that a user could type.
        "show_default": setting.default if setting.default_in_words else True,
    }
    kind: Any
    if setting.flag:
        kind = Annotated[
            str | None,
            typer.Option(
                setting.flag, metavar=setting.form, rich_help_panel=setting.group, **shared
            ),
        ]
    else:
        kind = Annotated[list[str] | None, typer.Argument(metavar="MODEL", **shared)]
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=kind,
        default=None if setting.default_in_words else setting.default,
    )
