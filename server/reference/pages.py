"""Which pages there are."""

from server.reference.api import api_page
from server.reference.commands import commands_page
from server.reference.configuration import configuration_page

_NOTE = "<!-- Made by `make docs` of {source}: change that, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """The text of every page, in Markdown, by its file's name."""
    made = {
        "api.md": ("server/protocol and server/openapi", api_page()),
        "cli.md": ("server/cli.py", commands_page()),
        "configuration.md": ("server/schema.py", configuration_page()),
    }
    return {name: _NOTE.format(source=source) + text for name, (source, text) in made.items()}
