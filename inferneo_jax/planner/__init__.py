"""Estimates the memory and speed of a model on hardware that need not be present."""
