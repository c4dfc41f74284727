"""The wire: what requests may hold, and the shapes of the answers."""
