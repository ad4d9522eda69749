"""Tests of each sink, and of what all sinks promise."""
