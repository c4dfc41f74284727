"""Bytes: connections, bodies, frames, errors, and what Hypercorn leaves to us."""
