"""The fake engine's server for shapes; the real one is ``address`` of the folder above."""

from fixtures import rig, shared_rig, tokenizer

__all__ = ["rig", "shared_rig", "tokenizer"]
