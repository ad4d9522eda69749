"""Tests of the program as a separate process."""
