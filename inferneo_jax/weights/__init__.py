"""Readers of other formats, the converter, and the checkpoints of this package."""
