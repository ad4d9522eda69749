"""HTTP calls that end in time, and the words for what came of them."""
