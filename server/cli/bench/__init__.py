"""``inferneo bench``: benchmarks of a server, of the engine alone, and of two servers in turn."""
