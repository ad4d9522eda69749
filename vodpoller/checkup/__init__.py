"""`vodpoller check --connect`: everything that the daemon will need, tried without using it up."""
