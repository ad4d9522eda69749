"""What VOD says: events, which event an arrival is, and how an answer is read."""
