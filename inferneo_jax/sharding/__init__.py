"""The device mesh, and the padding of sizes to multiples of its axes."""
