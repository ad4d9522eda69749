"""The VOD event API: pulling, confirming, and what an answer means."""
