"""The output of commands: tables on stdout, log lines on stderr."""

import os
import sys
from datetime import UTC, datetime
from typing import Final

from rich.console import Console

from vodpoller.config.model import Config
from vodpoller.logs import LineLogger, Logger, make_logger

PIPED_WIDTH: Final = 200


def make_console(*, stderr: bool = False) -> Console:
    """The console for tables. In a pipe or a file, a table may be up to `PIPED_WIDTH` characters wide.

    Args:
        stderr: Whether to write to stderr instead of stdout.
    """
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH, markup=False, highlight=False)


def make_log(config: Config, *, quiet: bool = False, lines: LineLogger | None = None) -> Logger:
    """The log on stderr.

    Args:
        config: Gives the level, the format, and the secrets that must not appear in a line.
        quiet: Whether to omit the lines of level "info", because a progress bar is shown.
        lines: As for `make_logger`.
    """
    return make_logger(
        sys.stderr,
        level="warning" if quiet and config.log.level == "info" else config.log.level,
        log_format=config.log.format,
        secrets=config.hidden,
        journald_stream=os.environ.get("JOURNAL_STREAM", ""),
        lines=lines,
    )


def iso_time(at: float) -> str:
    """Format a time, in seconds since 1970, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
