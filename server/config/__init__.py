"""Settings: one schema, read from flags, variables and a file."""
