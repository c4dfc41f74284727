"""The fake engine's server."""

from fixtures import rig, shared_rig, tokenizer

__all__ = ["rig", "shared_rig", "tokenizer"]
