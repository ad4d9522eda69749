"""Events as JSON lines in a file: appended durably, and read back after a crash or a rotation."""
