"""The web application: an OpenAI-compatible API over the engine of ``inferneo_jax``."""
