"""From text to token ids: templates, prompts and the threads for text work."""
