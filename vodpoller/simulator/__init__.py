"""A simulator of the VOD event API."""
