"""A browser: Debian's Chromium, driven by Playwright."""

from browsing import browser, visit
from fixtures import rig, shared_rig, tokenizer

__all__ = ["browser", "rig", "shared_rig", "tokenizer", "visit"]
