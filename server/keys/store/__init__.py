"""Where keys, limits and usage are kept: SQLite, or Redis."""
