"""The fake engine's server, and ways to ask it that read like the contract."""

from fixtures import rig, shared_rig, tokenizer

__all__ = ["rig", "shared_rig", "tokenizer"]
