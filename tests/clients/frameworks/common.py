"""What the scripts of this folder share; their environment has none of the server's packages."""

import json
import sys
from collections.abc import Callable

SERVER, LIMITED, KEY = sys.argv[1:]
"""Addresses of a server without keys and of one with, and a key of one request a minute."""
CHAT, EMBED = "org/tiny-chat", "tiny-embed"
LONG = "x" * 700
"""More tokens than the model's context holds."""


def raised(call: Callable[[], object]) -> list[str]:
    """The names of the classes of what ``call`` raised, the most special first."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return [kind.__name__ for kind in type(error).__mro__]
    return []


def say(**found: object) -> None:
    """Hand what was found to the test, as the last line."""
    print(json.dumps(found))
