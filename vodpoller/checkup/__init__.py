"""`vodpoller check --connect`: test all that the daemon needs, without consuming an event or writing."""
