"""A browser: Debian's Chromium, driven by Playwright."""

from tests.web.browsing import browser, visit

__all__ = ["browser", "visit"]
