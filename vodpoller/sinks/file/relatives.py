"""The files that may hold our lines, found by inode, since a rename can come at any time."""

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A file that is renamed this often while it is looked for is not logrotate's.
_RENAMES_MAX = 3
# What is put behind a name by logrotate, with and without dateext, or by the sink itself.
_ROTATED = re.compile(r"\.\d+|-(?P<date>\d+)")
# A rotated file that was compressed has a new inode: it can neither be recognised nor read.
_NEVER_RELATIVES = (".lock", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True, slots=True)
class Relative:
    """The file itself, or what may be a rotated one: `x.jsonl.1`, `x.jsonl-20261123`.

    Args:
        path: Its path.
        changed_at_ns: Time of its last change.
        is_rotated: Whether its name is one that a rotation gives, and not that of a copy that a person made.
        date: The date that a rotation put into its name; empty if it did not.
    """

    path: str
    changed_at_ns: int
    is_rotated: bool
    date: str

    def is_younger_than(self, other: "Relative") -> bool:
        """Whether lines were written to it later, or at the same time.

        The time of its last change says so, or the date in its name if the clock was set back meanwhile.
        """
        return self.changed_at_ns >= other.changed_at_ns or (bool(other.date) and self.date > other.date)


class Relatives:
    """The files that may hold our lines: the file itself, and what logrotate may have made of it.

    Args:
        path: Of the file itself.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def found(self) -> dict[int, Relative]:
        """What there is of them now, by inode."""
        name = self._path.name
        found = {}
        with os.scandir(self._path.parent) as entries:
            for entry in entries:
                if entry.name.startswith(name) and not entry.name.endswith(_NEVER_RELATIVES):
                    with suppress(FileNotFoundError):  # renamed or removed a moment ago
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(status.st_mode):
                            rotated = _ROTATED.fullmatch(entry.name.removeprefix(name))
                            date = rotated["date"] or "" if rotated else ""
                            found[status.st_ino] = Relative(entry.path, status.st_mtime_ns, rotated is not None, date)
        return found

    def open(self, inode: int, flags: int = os.O_RDONLY) -> int | None:
        """A descriptor for a file, whatever it is called by now; None if it is gone."""
        for _ in range(_RENAMES_MAX):
            relative = self.found().get(inode)
            if relative is None:
                return None
            with suppress(FileNotFoundError):
                fd = os.open(relative.path, flags | os.O_CLOEXEC)
                if os.fstat(fd).st_ino == inode:
                    return fd
                os.close(fd)
        return None
