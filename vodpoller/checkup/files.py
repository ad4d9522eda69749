"""Checks of the rights of files and folders: who can read secrets, and who can write what the daemon writes.

They are judged by owner, group and mode. Outside the journal's folder, drop-ins of the unit and lists of access control
may say otherwise, so that what is found there is never more than a warning.
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
    """Who runs the daemon, as far as it can be known."""

    uid: int
    gids: Collection[int]
    name: str

    def may_write(self, path: Path) -> bool:
        """Whether it may write a file, or make files in a folder."""
        status = path.stat()
        if status.st_uid == self.uid:
            bits = status.st_mode >> 6
        else:
            bits = status.st_mode >> 3 if status.st_gid in self.gids else status.st_mode
        wanted = os.W_OK | os.X_OK if stat.S_ISDIR(status.st_mode) else os.R_OK | os.W_OK
        return bits & wanted == wanted


def check_files(config: Config, *, as_root: bool) -> Iterator[Finding]:
    """Look at the rights of secrets' files, of the journal, and of the files of sinks.

    Args:
        config: Valid.
        as_root: Whether root asks, who may write everything: then it is also judged whether the owner of the journal's
            folder may, who probably runs the daemon.
    """
    journal = Path(os.path.realpath(config.journal.path))
    written = [*_written_at(journal, _BESIDE_JOURNAL)]
    for file in files_of_sinks(config):
        written += _written_at(file, _BESIDE_FILE)
    written = list(dict.fromkeys(written))
    found = [
        *_exposed([secret.path for secret in config.secrets() if secret.path is not None]),
        *_open_to_all(written),
        *(_closed_to(_owner_of(journal), written, journal.parent) if as_root else ()),
    ]
    yield from found
    if not found:
        text = "others can neither read a secret's file nor write what vodpoller writes"
        yield Finding(what=_WHAT, level=Level.GOOD, text=text)


def _written_at(path: Path, endings: Sequence[str]) -> Iterator[Path]:
    """What exists of a file, of those beside it, and of the folder that holds them or is to hold them."""
    with suppress(OSError):  # the check of the journal or sink says what is wrong
        yield existing_folder(path.parent)
    for ending in endings:
        file = path.with_name(path.name + ending)
        with suppress(OSError):
            if stat.S_ISREG(file.stat().st_mode):
                yield file


def _exposed(paths: Sequence[Path]) -> Iterator[Finding]:
    for path in dict.fromkeys(paths):
        if _mode_for_all(path) & stat.S_IROTH:
            yield Finding(
                what=_WHAT,
                level=Level.WARNING,
                text=f"every user of this machine can read the secret in {path}",
                remedy=f"chmod o= {path}",
            )


def _open_to_all(paths: Sequence[Path]) -> Iterator[Finding]:
    for path in paths:
        mode = _mode_for_all(path)
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            does = "put other files in the place of those in" if stat.S_ISDIR(mode) else "write"
            yield Finding(
                what=_WHAT,
                level=Level.WARNING,
                text=f"every user of this machine can {does} {path}",
                remedy=f"chmod o-w {path}",
            )


def _mode_for_all(path: Path) -> int:
    """The mode of a file or folder; 0 if the folders on the way do not let everyone through, or it is gone."""
    try:
        is_open = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
        return path.stat().st_mode if is_open else 0
    except OSError:
        return 0


def _owner_of(journal: Path) -> _User | None:
    """The owner of the journal's folder, if it is there and not root's."""
    try:
        status = journal.parent.stat()
    except OSError:
        return None
    if status.st_uid == 0:
        return None
    try:
        entry = pwd.getpwuid(status.st_uid)
    except KeyError:  # a user of DynamicUser= that is not running
        return _User(uid=status.st_uid, gids=(status.st_gid,), name=f"with the id {status.st_uid}")
    return _User(uid=entry.pw_uid, gids=os.getgrouplist(entry.pw_name, entry.pw_gid), name=entry.pw_name)


def _closed_to(user: _User | None, paths: Sequence[Path], own_folder: Path) -> Iterator[Finding]:
    """What the user that owns a folder cannot write, there and elsewhere."""
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
                remedy=f"if so, give it to that user: chown {user.uid} {path}",
            )
