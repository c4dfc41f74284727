"""``cli.md``: every command, generated from the functions that ``inferneo`` runs."""

import enum
import inspect
import itertools
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from server.cli.reference.markdown import anchor, fence, join, table
from server.cli.reference.types import span

_ABOUT = """# The `inferneo` command

`inferneo COMMAND --help` says the same. What goes wrong for a known reason is one message on
standard error, and exit status 1; a command line that is wrong is exit status 2."""

_VALUES: dict[Any, str] = {int: "N", float: "X", bool: "", Path: "PATH"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An argument or option.

    Attributes:
        flags: its names, such as ``--json``; empty for an argument.
        value: the name of its value; empty if it takes none.
        panel: the group that it is shown in.
        required: whether it must be given.
        default: the default, in Markdown.
        text: its description.
    """

    flags: tuple[str, ...]
    value: str
    panel: str
    required: bool
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: ``name`` is its full name, ``text`` its docstring, ``epilog`` its last text."""

    name: str
    text: str
    epilog: str
    parameters: tuple[Parameter, ...]


def commands() -> list[Command]:
    """Return every command, those of groups last."""
    from server.cli.main import app

    return list(_commands(app, "inferneo"))


def commands_page() -> str:
    """Return the text of the page."""
    found = commands()
    contents = table(
        ("command", ""),
        ((f"[`{each.name}`]({anchor(each.name)})", each.text.split("\n")[0]) for each in found),
    )
    return join([_ABOUT, contents, *map(_section, found)])


def _commands(app: typer.Typer, prefix: str) -> Iterator[Command]:
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        name = command.name or function.__name__.replace("_", "-")
        if not command.hidden:
            signature = inspect.signature(function, eval_str=True)
            yield Command(
                name=f"{prefix} {name}",
                text=command.help or inspect.getdoc(function) or "",
                epilog=command.epilog or "",
                parameters=tuple(
                    _parameter(each)
                    for each in signature.parameters.values()
                    if each.annotation is not typer.Context
                ),
            )
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _commands(group.typer_instance, f"{prefix} {group.name}")


def _parameter(parameter: inspect.Parameter) -> Parameter:
    kind, info = typing.get_args(parameter.annotation)[:2]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
    several = typing.get_origin(kind) is list
    if several:
        kind = typing.get_args(kind)[0]
    value = info.metavar or _VALUES.get(kind, parameter.name.upper().split("_")[-1])
    if several and isinstance(info, ArgumentInfo) and "..." not in value:
        value += "..."
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        value = "|".join(each.value for each in kind)
    return Parameter(
        flags=() if isinstance(info, ArgumentInfo) else _flags(parameter.name, kind, info),
        value=value,
        panel=info.rich_help_panel or "",
        required=parameter.default is inspect.Parameter.empty and not info.default_factory,
        default=_default(parameter.default, info),
        text=_words(info),
    )


def _flags(name: str, kind: Any, info: OptionInfo) -> tuple[str, ...]:
    # Typer keeps the first name that it is given as the default.
    names = (info.default, *(info.param_decls or ()))
    given = [name for name in names if isinstance(name, str) and name.startswith("-")]
    long = name.replace("_", "-")
    usual = f"--{long}/--no-{long}" if kind is bool else f"--{long}"
    return tuple(flag for flags in given or [usual] for flag in flags.split("/"))


def _default(value: Any, info: ArgumentInfo | OptionInfo) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    if value is inspect.Parameter.empty or value is None or value is False or value == "":
        return ""
    if value is True:
        return "yes"
    shown = value.value if isinstance(value, enum.Enum) else value
    return f"`{shown:g}`" if isinstance(shown, float) else f"`{shown}`"


def _words(info: ArgumentInfo | OptionInfo) -> str:
    """Return its help, its bounds, and the environment variable that is used without it."""
    parts = [info.help or ""]
    if bounds := span(info.min, info.max):
        parts.append(f"{bounds[0].upper()}{bounds[1:]}.")
    if info.envvar:
        names = [info.envvar] if isinstance(info.envvar, str) else info.envvar
        parts.append(f"Without it, {' or '.join(f'`{name}`' for name in names)} counts.")
    return " ".join(part for part in parts if part)


def _section(command: Command) -> str:
    usage = [command.name]
    arguments: list[tuple[str, ...]] = []
    options: dict[str, list[tuple[str, ...]]] = {}
    for each in command.parameters:
        if each.flags:
            shown = [f"{flag} {each.value}".rstrip() for flag in each.flags]
            usage += shown[:1] * each.required
            default = "required" if each.required else each.default
            row = (", ".join(f"`{flag}`" for flag in shown), default, each.text)
            options.setdefault(each.panel, []).append(row)
        else:
            optional = not (each.required or each.value.startswith("["))
            usage.append(f"[{each.value}]" if optional else each.value)
            arguments.append((f"`{each.value}`", each.default, each.text))
    if any(not each.required for each in command.parameters if each.flags):
        usage.append("[OPTIONS]")
    tables = [
        [f"**{panel}**" if panel else "", table(("option", "default", ""), rows)]
        for panel, rows in options.items()
    ]
    return join(
        [
            f"## `{command.name}`",
            *_paragraphs(command.text),
            fence("text", " ".join(usage)),
            table(("argument", "default", ""), arguments),
            *itertools.chain(*tables),
            *_examples(command.epilog),
        ]
    )


def _examples(epilog: str) -> Iterator[str]:
    """Yield an epilog's paragraphs; consecutive commands are one block."""
    blocks = itertools.groupby(epilog.split("\n\n"), lambda text: text.startswith("inferneo "))
    for are_commands, texts in blocks:
        yield fence("bash", "\n".join(texts)) if are_commands else "\n\n".join(texts)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a docstring's paragraphs; indented lines are commands."""
    for block in text.split("\n\n"):
        yield fence("bash", inspect.cleandoc(block)) if block.startswith("  ") else block
