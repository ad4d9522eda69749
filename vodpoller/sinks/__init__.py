"""The sinks, one file or folder each, and what they have in common."""
