"""When the sink renames its file, and the new name: the day or hour of the last line."""

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
        name: Its name in the IANA database, such as "Asia/Shanghai".

    Raises:
        ValueError: The time zone does not exist.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: a folder of the database, such as "Asia"
        raise ValueError(f'{name!r} is not a time zone (write its IANA name, such as "Asia/Shanghai")') from None


class Rotation:
    """Knows the period, a day or an hour, of a file's lines, and renames the file when the period is over.

    The period is the latest one in which a line was written, in local time. The file is in use until local time is
    later than this period: also if the clock is set back, and during both hours that have one name at the end of summer
    time.

    Args:
        path: Path of the file.
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
        """Begin with a file that was just opened. The time of its last change is the time of its last line."""
        self._period = self._period_at(file.changed_at) if file.end_bytes else ""

    def wrote(self, at: float) -> None:
        """Note that lines were written.

        Args:
            at: The time, in seconds since 1970.
        """
        self._period = max(self._period, self._period_at(at))

    def due(self, at: float) -> Path | None:
        """The path to which the file should be renamed now; None if its period is not over, or it has no lines.

        Args:
            at: The time, in seconds since 1970.
        """
        is_over = self._period and self._period < self._period_at(at)
        return self._path.with_name(f"{self._path.name}-{self._period}") if is_over else None

    def rename(self, target: Path) -> None:
        """Rename the file without replacing another file.

        rename(2) replaces an existing file. So an empty file with the new name is created first. A crash may leave this
        empty file behind, so the name of an empty file counts as free.

        Args:
            target: The path that `due` returned.

        Raises:
            FileExistsError: Another file has the name.
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
