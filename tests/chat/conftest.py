"""The fake engine's server, and chats with it."""

from fixtures import rig, shared_rig, tokenizer

__all__ = ["rig", "shared_rig", "tokenizer"]
