"""The models that are served: their sources and their loading."""
