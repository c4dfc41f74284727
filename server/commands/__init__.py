"""Commands that are no packages of their own; ``server/cli.py`` puts all of them together."""
