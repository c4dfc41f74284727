"""Output parsers: the text that a model writes, as content, reasoning and tool calls."""
