"""Delivering: one worker around each sink, and the deliveries that are in flight."""
