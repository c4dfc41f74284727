"""Where the files are that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of the checkout."""
GOLDEN = ROOT / "tests" / "golden"
FAMILIES = GOLDEN / "families"
"""Tiny random models, one for each family."""
