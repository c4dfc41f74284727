"""Readers of other formats: GGUF, safetensors and Hugging Face folders."""
