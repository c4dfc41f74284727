"""Jobs of several processes that run one model together."""
