"""``inferneo chat``: talk to a server in the terminal."""
