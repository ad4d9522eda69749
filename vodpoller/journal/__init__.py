"""The journal, our store of the ledger and of stored events: its contract, and its implementation in SQLite."""
