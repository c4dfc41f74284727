"""``python -m server.cli``: the ``inferneo`` command."""

from server.cli.main import main

main()
