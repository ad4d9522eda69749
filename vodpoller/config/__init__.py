"""The configuration: its tables, how it is read, and what its errors say."""
