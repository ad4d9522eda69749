"""The VOD event API: pulling, confirming, and the meaning of its answers."""
