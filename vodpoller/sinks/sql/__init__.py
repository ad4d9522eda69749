"""Events as rows of a database: the sinks `postgresql`, `mysql` and `sqlite`, and what they have in common."""
