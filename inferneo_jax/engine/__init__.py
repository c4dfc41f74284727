"""The threads that batch: the generation loop, the embedder, the follower of a job."""
