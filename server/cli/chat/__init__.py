"""``inferneo chat``: talk to a server in the terminal."""

BEGINNING = {"temperature": 0.7}
"""The parameters that a conversation begins with: at the API's own, 1.0, small models ramble."""
