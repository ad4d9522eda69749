"""Checks of the rights of files and folders: who can read secrets, and who can write what the daemon writes.

The checks read owner, group and mode. Outside the journal's folder, drop-ins of the unit and access control lists may
change these rights, so a finding there is at most a warning.
"""

import os
import pwd
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vodpoller.checkup.finding import Finding, Level
from vodpoller.checkup.places import files_of_sinks
from vodpoller.config.model import Config
from vodpoller.durable import existing_folder

_WHAT: Final = "files"
_BESIDE_JOURNAL: Final = ("", "-wal", "-shm", ".lock")
_BESIDE_FILE: Final = ("", ".lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class _User:
    """The user that probably runs the daemon."""

    uid: int
    gids: Collection[int]
    name: str

    def may_write(self, path: Path) -> bool:
        """Whether the user may write a file, or create files in a folder."""
        status = path.stat()
        if status.st_uid == self.uid:
            bits = status.st_mode >> 6
        else:
            bits = status.st_mode >> 3 if status.st_gid in self.gids else status.st_mode
        wanted = os.W_OK | os.X_OK if stat.S_ISDIR(status.st_mode) else os.R_OK | os.W_OK
        return bits & wanted == wanted


def check_files(config: Config, *, as_root: bool) -> Iterator[Finding]:
    """Check the rights of the files of secrets, of the journal, and of the files of sinks.

    Args:
        config: Valid.
        as_root: Whether root runs the check. Root may write everything; so it is also checked what the owner of the
            journal's folder, who probably runs the daemon, may write.
    """
    journal = Path(os.path.realpath(config.journal.path))
    written = [*_written_at(journal, _BESIDE_JOURNAL)]
    for file in files_of_sinks(config):
        written += _written_at(file, _BESIDE_FILE)
    written = list(dict.fromkeys(written))
    found = [
        *_readable_by_all([secret.path for secret in config.secrets() if secret.path is not None]),
        *_writable_by_all(written),
        *(_not_writable_by(_owner_of(journal), written, journal.parent) if as_root else ()),
    ]
    yield from found
    if not found:
        text = "other users can neither read the files of secrets nor write the files that vodpoller writes"
        yield Finding(what=_WHAT, level=Level.GOOD, text=text)


def _written_at(path: Path, endings: Sequence[str]) -> Iterator[Path]:
    """The file and the files beside it, if they exist, and their folder (or its nearest parent that exists)."""
    with suppress(OSError):  # the check of the journal or sink reports the problem
        yield existing_folder(path.parent)
    for ending in endings:
        file = path.with_name(path.name + ending)
        with suppress(OSError):
            if stat.S_ISREG(file.stat().st_mode):
                yield file


def _readable_by_all(paths: Sequence[Path]) -> Iterator[Finding]:
    for path in dict.fromkeys(paths):
        if _mode_for_all(path) & stat.S_IROTH:
            yield Finding(
                what=_WHAT,
                level=Level.WARNING,
                text=f"every user of this machine can read the secret in {path}",
                remedy=f"chmod o= {path}",
            )


def _writable_by_all(paths: Sequence[Path]) -> Iterator[Finding]:
    for path in paths:
        mode = _mode_for_all(path)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            does = "replace the files in" if stat.S_ISDIR(mode) else "write"
            yield Finding(
                what=_WHAT,
                level=Level.WARNING,
                text=f"every user of this machine can {does} {path}",
                remedy=f"chmod o-w {path}",
            )


def _mode_for_all(path: Path) -> int:
    """The mode of a file or folder; 0 if not every user may enter its parent folders, or if it does not exist."""
    try:
        is_open = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
        return path.stat().st_mode if is_open else 0
    except OSError:
        return 0


def _owner_of(journal: Path) -> _User | None:
    """The owner of the journal's folder; None if the folder does not exist or belongs to root."""
    try:
        status = journal.parent.stat()
    except OSError:
        return None
    if status.st_uid == 0:
        return None
    try:
        entry = pwd.getpwuid(status.st_uid)
    except KeyError:  # the user of a service with DynamicUser= that does not run now
        return _User(uid=status.st_uid, gids=(status.st_gid,), name=f"with the id {status.st_uid}")
    return _User(uid=entry.pw_uid, gids=os.getgrouplist(entry.pw_name, entry.pw_gid), name=entry.pw_name)


def _not_writable_by(user: _User | None, paths: Sequence[Path], own_folder: Path) -> Iterator[Finding]:
    """The paths that a user cannot write. Inside the user's own folder this is a problem, elsewhere a warning."""
    if user is None:
        return
    for path in paths:
        with suppress(OSError):
            if user.may_write(path):
                continue
            yield Finding(
                what=_WHAT,
                level=Level.PROBLEM if path.is_relative_to(own_folder) else Level.WARNING,
                text=f"{path} cannot be written by the user {user.name}, who owns the journal's folder and so probably"
                " runs vodpoller",
                remedy=f"if so, make that user the owner: chown {user.uid} {path}",
            )
