"""``inferneo chat``: talk to a server in the terminal."""

BEGINNING = {"temperature": 0.7}
"""The initial parameters of a conversation: at the API's default of 1.0, small models ramble."""
