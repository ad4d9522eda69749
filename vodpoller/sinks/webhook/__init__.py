"""The sink `webhook`: events as HTTP requests."""
