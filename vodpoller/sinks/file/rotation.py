"""When the sink gives its file another name, and which: that of the day or hour of its last line."""

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final, Literal
from zoneinfo import ZoneInfo

from vodpoller.sinks.file.appending import Files, OpenFile

Rotate = Literal["none", "daily", "hourly"]

_PERIODS: Final = {"daily": "%Y%m%d", "hourly": "%Y%m%d%H"}


def zone(name: str) -> ZoneInfo:
    """A time zone.

    Args:
        name: In the IANA database, as "Asia/Shanghai".

    Raises:
        ValueError: There is not one of this name.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: a folder of the database, such as "Asia"
        raise ValueError(f'{name!r} is not a time zone (write its IANA name, such as "Asia/Shanghai")') from None


class Rotation:
    """Knows the period, a day or an hour, of a file's lines, and renames the file when that is over.

    The period is the latest in which a line was written, as local time names it. So a file goes on until local time
    gets beyond it: if the clock is set back, and through both of the hours that the end of summer time gives one name.

    Args:
        path: Of the file.
        files: The file system.
        rotate: As configured.
        time_zone: As configured.
    """

    def __init__(self, path: Path, files: Files, *, rotate: Rotate, time_zone: str) -> None:
        self._path = path
        self._files = files
        self._format = _PERIODS.get(rotate)
        self._zone = zone(time_zone)
        self._period = ""

    def begin(self, file: OpenFile) -> None:
        """Take up with a file that was just opened: the last line in it is as old as its last change."""
        self._period = self._period_at(file.changed_at) if file.end_bytes else ""

    def wrote(self, at: float) -> None:
        """Lines were written.

        Args:
            at: The time, in seconds since 1970.
        """
        self._period = max(self._period, self._period_at(at))

    def due(self, at: float) -> Path | None:
        """The name that the file should get now; None if its period is not over, or it has no lines.

        Args:
            at: The time, in seconds since 1970.
        """
        is_over = self._period and self._period < self._period_at(at)
        return self._path.with_name(f"{self._path.name}-{self._period}") if is_over else None

    def rename(self, target: Path) -> None:
        """Rename the file, never over another one.

        rename(2) replaces what has the name. So the name is taken first, by an empty file. A crash may leave that one
        behind, so an empty file counts as free.

        Args:
            target: As `due` gave it.

        Raises:
            FileExistsError: Something else has the name.
            OSError: The file cannot be renamed; nothing has changed.
        """
        try:
            os.close(self._files.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if target.is_symlink() or not target.is_file() or target.stat().st_size:
                raise
        try:
            self._files.rename(self._path, target)
        except OSError:
            with suppress(OSError):
                target.unlink()
            raise

    def _period_at(self, at: float) -> str:
        return datetime.fromtimestamp(at, self._zone).strftime(self._format) if self._format else ""
