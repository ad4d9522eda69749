"""The sinks `postgresql`, `mysql` and `sqlite`: events as rows of a database."""
