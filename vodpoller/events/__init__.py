"""The events of VOD: their content, their identity, and how they are read."""
