"""The API's description, made of the models that validate requests and those of the answers."""

from server.api.openapi.document import document

__all__ = ["document"]
