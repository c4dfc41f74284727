"""Who runs next, without jax: slots, blocks, prefill chunks and drafts."""
