"""One model over several processes, which run the same steps in the same order."""
