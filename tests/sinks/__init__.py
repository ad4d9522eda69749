"""Tests of the sinks, one by one and all alike."""
