"""`python -m vodpoller`: the same as the `vodpoller` command."""

from vodpoller.cli import main

main()
