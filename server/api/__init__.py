"""Endpoints: what a request may hold, what an answer holds, and what is served where."""
