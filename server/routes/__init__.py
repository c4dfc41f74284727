"""Blueprints: what is served under which path."""
