"""A request's life from admission to answer."""
