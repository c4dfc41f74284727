"""The list of pages."""

from server.cli.reference.api import api_page
from server.cli.reference.commands import commands_page
from server.cli.reference.configuration import configuration_page

_NOTE = "<!-- Made by `make docs` of {source}: change that, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """Return the Markdown text of every page, by file name."""
    made = {
        "api.md": ("server/protocol and server/openapi", api_page()),
        "cli.md": ("server/cli/main.py", commands_page()),
        "configuration.md": ("server/config/schema.py", configuration_page()),
    }
    return {name: _NOTE.format(source=source) + text for name, (source, text) in made.items()}
