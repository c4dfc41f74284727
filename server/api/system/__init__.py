"""Health, metrics, version and the API's description."""
