"""The pages of ``docs/reference``, generated from the schemas that the program itself uses."""

from server.cli.reference.pages import pages

__all__ = ["pages"]
