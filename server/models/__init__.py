"""Which models are served, where they come from, and how far they are loaded."""
