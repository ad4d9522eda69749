"""The promises against models of VOD's queue and of a disk."""
