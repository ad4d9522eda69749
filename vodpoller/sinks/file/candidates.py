"""The files that may hold our lines, found by inode, since a file may be renamed at any time."""

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# If a file is renamed more often than this while it is looked for, it is not logrotate that renames it.
_RENAMES_MAX = 3
# Suffixes of rotated files: of logrotate, with and without dateext, and of the sink itself.
_ROTATED = re.compile(r"\.\d+|-(?P<date>\d+)")
# A compressed file has a new inode, so it cannot be recognised; nor can its lines be read.
_EXCLUDED_SUFFIXES = (".lock", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class CandidateFile:
    """The file itself, or a file that may be a rotated one: `x.jsonl.1`, `x.jsonl-20261123`.

    Args:
        path: Its path.
        changed_at_ns: Unix time of its last change, in nanoseconds.
        is_rotated: Whether its name is one that a rotation gives, and not the name of a copy that a person made.
        date: The date that a rotation put into its name; empty if there is none.
    """

    path: str
    changed_at_ns: int
    is_rotated: bool
    date: str

    def is_newer_than(self, other: "CandidateFile") -> bool:
        """Whether lines were written to it later than to the other file, or at the same time.

        The times of the last change decide, or the dates in the names if the clock was set back meanwhile.
        """
        return self.changed_at_ns >= other.changed_at_ns or (bool(other.date) and self.date > other.date)


class CandidateFiles:
    """The files that may hold our lines: the file itself and its rotated files.

    Args:
        path: Path of the file itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self) -> dict[int, CandidateFile]:
        """The files that exist now, by inode."""
        name = self._path.name
        found = {}
        with os.scandir(self._path.parent) as entries:
            for entry in entries:
                if entry.name.startswith(name) and not entry.name.endswith(_EXCLUDED_SUFFIXES):
                    with suppress(FileNotFoundError):  # it was renamed or removed meanwhile
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            rotated = _ROTATED.fullmatch(entry.name.removeprefix(name))
                            date = rotated["date"] or "" if rotated else ""
                            found[status.st_ino] = CandidateFile(
                                entry.path, status.st_mtime_ns, rotated is not None, date
                            )
        return found

    def open(self, inode: int, flags: int = os.O_RDONLY) -> int | None:
        """Open the file with this inode, whatever its name is now. Returns a descriptor; None if it does not exist."""
        for _ in range(_RENAMES_MAX):
            candidate = self.find().get(inode)
            if candidate is None:
                return None
            with suppress(FileNotFoundError):
                fd = os.open(candidate.path, flags | os.O_CLOEXEC)
                if os.fstat(fd).st_ino == inode:
                    return fd
                os.close(fd)
        return None
