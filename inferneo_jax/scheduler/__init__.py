"""Who runs next, in plain Python: slots, blocks, prefill chunks and drafts."""
