"""``cli.md``: every command, of the functions that ``inferneo`` runs."""

import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer
from typer.models import ArgumentInfo, DefaultPlaceholder, OptionInfo

from server.reference.markdown import anchor, fence, join, table

_ABOUT = """# The `inferneo` command

`inferneo COMMAND --help` says the same. What goes wrong for a known reason is one message on standard error and exit status 1; a
command line that cannot be read is exit status 2."""

_TYPES: dict[Any, str] = {int: "N", float: "X", bool: ""}


def commands_page() -> str:
    """The page."""
    from server.cli import app

    found = list(_commands(app, "inferneo"))
    contents = table(
        ("command", ""),
        ((f"[`{name}`]({anchor(name)})", _text(command).split("\n")[0]) for name, command in found),
    )
    return join([_ABOUT, contents, *(_section(name, command) for name, command in found)])


def _commands(app: typer.Typer, prefix: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every command's whole name, and its function; groups last."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        if not command.hidden:
            yield f"{prefix} {name}", command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _commands(group.typer_instance, f"{prefix} {group.name}")


def _text(command: Callable[..., Any]) -> str:
    return inspect.getdoc(command) or ""


def _section(name: str, command: Callable[..., Any]) -> str:
    arguments, options, usage = [], [], [name]
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, info = _typed(parameter)
        default = _default(parameter, info)
        required = parameter.default is inspect.Parameter.empty and not info.default_factory
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            usage.append(shown if required or shown.startswith("[") else f"[{shown}]")
            arguments.append((f"`{shown}`", _help(info)))
        else:
            options.append(
                (_flags(parameter.name, kind, info), "required" if required else default, _help(info))
            )
            if required:
                usage.append(_flags(parameter.name, kind, info).replace("`", ""))
    if any(option[1] != "required" for option in options):
        usage.append("[OPTIONS]")
    return join(
        [
            f"## `{name}`",
            *_paragraphs(_text(command)),
            fence("text", " ".join(usage)),
            table(("argument", ""), arguments),
            table(("option", "default", ""), options),
        ]
    )


def _typed(parameter: inspect.Parameter) -> tuple[Any, ArgumentInfo | OptionInfo]:
    """The type of a value, and what Typer was told of the parameter."""
    kind, info = typing.get_args(parameter.annotation)[:2]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return kind, info


def _flags(name: str, kind: Any, info: OptionInfo) -> str:
    long = name.replace("_", "-")
    given = [flag for flag in info.param_decls or () if flag.startswith("-")]
    flags = given or ([f"--{long}", f"--no-{long}"] if kind is bool else [f"--{long}"])
    value = info.metavar or _TYPES.get(kind, name.upper().split("_")[-1])
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        value = "|".join(each.value for each in kind)
    return ", ".join(f"`{flag} {value}`" if value else f"`{flag}`" for flag in flags)


def _default(parameter: inspect.Parameter, info: ArgumentInfo | OptionInfo) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    value = parameter.default
    if value in (inspect.Parameter.empty, None, "", False) or isinstance(value, DefaultPlaceholder):
        return ""
    shown = value.value if isinstance(value, enum.Enum) else value
    return f"`{'yes' if shown is True else shown}`"


def _help(info: ArgumentInfo | OptionInfo) -> str:
    """Its words, bounds, and the variable that is read where it is not given."""
    parts = [info.help or ""]
    if info.min is not None and info.max is not None:
        parts.append(f"{info.min:g} to {info.max:,g}.")
    elif info.min is not None:
        parts.append(f"At least {info.min:g}.")
    if info.envvar:
        names = [info.envvar] if isinstance(info.envvar, str) else info.envvar
        parts.append(f"Else {' or '.join(f'`{name}`' for name in names)}.")
    return " ".join(part for part in parts if part)


def _paragraphs(text: str) -> Iterator[str]:
    """A docstring's; indented lines are commands."""
    for block in text.split("\n\n"):
        if block.startswith("  "):
            yield fence("bash", inspect.cleandoc(block))
        else:
            yield block
