"""The names and shapes of weights: those that are there against those that a model needs."""

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
    """Raises WeightsError when names or shapes differ, naming up to ten of each kind.

    ``unused`` are the stored names that nobody wants; all that are not wanted unless given.
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
    """A name as it stands, unless it is no plain word."""
    return name if _PLAIN.fullmatch(name) else shown(name)
