"""Our store of the ledger and of stored events: what it promises, and how SQLite keeps it."""
