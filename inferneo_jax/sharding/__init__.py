"""The device mesh, and sizes made to divide by it."""
