"""The pages of ``docs/reference``, made of the schemas that the program itself runs on."""

from server.cli.reference.pages import pages

__all__ = ["pages"]
