"""Text and token ids: tokenizer, incremental decoding, stop strings, chat templates."""
