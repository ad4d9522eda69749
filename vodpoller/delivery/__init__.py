"""Delivering: one worker for each sink, and the deliveries that are in flight."""
