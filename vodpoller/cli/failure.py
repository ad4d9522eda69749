"""The message of a command that cannot continue."""

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

import click

from vodpoller.logs import is_journald, printable


def fail(problems: Iterable[str], code: int) -> NoReturn:
    """Print problems to stderr, one line each, and exit.

    Args:
        problems: Why the command cannot continue.
        code: The exit code.
    """
    priority = "<3>" if is_journald(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    for problem in problems:
        click.echo(f"{priority}vodpoller: {printable(problem)}", err=True)
    sys.exit(code)
