"""vLLM's endpoints that OpenAI's API does not have."""
