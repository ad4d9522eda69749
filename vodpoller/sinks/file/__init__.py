"""The sink `file`: events as JSON lines, appended durably, and read again after a crash or a rotation."""
