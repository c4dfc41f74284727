"""The ``inferneo`` command."""
