"""The endpoints for health, metrics, the version and the OpenAPI description."""
