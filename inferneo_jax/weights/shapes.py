"""Compares the weights that are stored with those that a model needs."""

import re
from collections.abc import Iterable, Mapping

from inferneo_jax.errors import WeightsError
from inferneo_jax.files import shown

_LISTED = 10
_PLAIN = re.compile(r"[\w.-]{1,100}", re.ASCII)


def compare_shapes(
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
    unused: Iterable[str] | None = None,
) -> None:
    """Compare the names and shapes of stored weights with those that a model needs.

    Args:
        stored: shapes of the stored weights by name.
        wanted: shapes of the model's weights by name.
        where: the file or folder, for the error.
        unused: stored names that must not be there; by default all that are not wanted.

    Raises:
        WeightsError: lists up to ten missing, unused and misshapen weights each.
    """
    misshapen = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    kinds = {
        "missing": wanted.keys() - stored.keys(),
        "unused": stored.keys() - wanted.keys() if unused is None else unused,
        "misshapen": misshapen,
    }
    problems = []
    for kind, names in kinds.items():
        if not (found := sorted(names)):
            continue
        listed = [_plain(name) for name in found[:_LISTED]]
        if kind == "misshapen":
            listed = [
                f"{text} is {shown(list(stored[name]))}, not {list(wanted[name])}"
                for text, name in zip(listed, found, strict=False)
            ]
        more = ", ..." if len(found) > _LISTED else ""
        problems.append(f"{len(found)} {kind} ({', '.join(listed)}{more})")
    if problems:
        raise WeightsError(f"the weights of {where} do not fit the model: {'; '.join(problems)}")


def _plain(name: str) -> str:
    """The name, quoted if it has unusual characters."""
    return name if _PLAIN.fullmatch(name) else shown(name)
