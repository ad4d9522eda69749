"""HTTP calls with one time limit each, and the texts that describe their results."""
