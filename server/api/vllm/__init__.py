"""Endpoints of vLLM that OpenAI does not have."""
