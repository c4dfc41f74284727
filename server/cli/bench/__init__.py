"""``inferneo bench``: load on a server, on the engine alone, and on two servers in turn."""
