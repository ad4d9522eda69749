"""The place of a journal: which paths are possible, opening its file and lock, and the errors if that fails."""

import errno
import os
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from vodpoller.durable import Folders, kind_of_file, may_pass, take_lock
from vodpoller.errors import JournalError, UnusableJournalError
from vodpoller.logs import Logger

BUSY_SECS: Final = 2.0  # a command may lock the file for a moment

# Errors of flock(2) on a file system that has no locks.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# SQLITE_ERROR at the start: a table or column is missing.
_UNUSABLE: Final = _CORRUPT | {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}
_FORBIDDEN: Final = frozenset({sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


def check_place(path: Path) -> None:
    """Refuse a path at which no journal can be.

    Raises:
        UnusableJournalError: No journal can be at this path; see `problem_of_place`.
    """
    if problem := problem_of_place(path):
        raise UnusableJournalError(problem)


def problem_of_place(path: Path) -> str | None:
    """Why no journal can be at this path: only a regular file can hold one. None if it is possible.

    Args:
        path: The path of a journal, or of one that is to be made.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # it does not exist yet; or opening it will raise an error that says what is wrong
        return None
    if stat.S_ISREG(mode):
        return None
    example = path / "journal.db" if stat.S_ISDIR(mode) else "/var/lib/vodpoller/journal.db"
    kind = kind_of_file(mode)
    return f"{path}: this is {kind}, and a journal is a regular file: set journal.path to one (for example {example})"


def make_folder(folder: Path, log: Logger) -> None:
    """Make the journal's folder, if it is missing.

    Args:
        folder: The folder.
        log: Destination of a warning if it cannot be synced.

    Raises:
        JournalError: It cannot be made; an `UnusableJournalError` if waiting does not help.
    """
    try:
        Folders(lambda text: log.warning("config.warning", message=f"journal.path: {text}")).make(folder)
    except OSError as error:
        raise cannot_make(folder, error, "the journal's folder cannot be made") from error


def make_private(path: Path) -> None:
    """Keep other users from reading events: SQLite makes files of mode 0644, and a WAL with the mode of its file.

    Raises:
        JournalError: The file cannot be opened for writing; an `UnusableJournalError` if waiting does not help.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
    except OSError as error:
        raise cannot_make(path, error, "the journal cannot be opened for writing") from error
    for file in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm", ".lock"))):
        with suppress(OSError):  # it does not exist, another user owns it, or the file system has no modes
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & 0o007:
                file.chmod(mode & ~0o007)


def connect(path: Path) -> sqlite3.Connection:
    """Open a journal's file, for several threads that share a lock of ours. Transactions are explicit.

    Raises:
        sqlite3.Error: It cannot be opened.
    """
    # Absolute: for SQLite some relative names, such as ":memory:", do not name a file.
    return sqlite3.connect(
        path.absolute(), timeout=BUSY_SECS, isolation_level=None, check_same_thread=False, cached_statements=64
    )


def lock_journal(path: Path) -> int:
    """Keep other processes from writing the journal, by a lock file beside the journal.

    Returns:
        The descriptor that holds the lock until it is closed.

    Raises:
        JournalError: Another process has it, or it cannot be made now.
        UnusableJournalError: The file system has no locks, or the file cannot be made.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        return take_lock(lock_path)
    except BlockingIOError as error:
        raise JournalError(
            f"{path}: another process has this journal open: is vodpoller already running "
            f"(`systemctl status vodpoller`, `fuser {lock_path}`)? Stop it, or set another journal.path"
        ) from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise UnusableJournalError(
                f"{lock_path}: cannot be locked: {error.strerror}. Without a lock two daemons could write one journal;"
                " some network file systems have none. Put the journal on a local disk (journal.path)"
            ) from error
        raise cannot_make(lock_path, error, "cannot be written") from error


def device_and_inode(path: Path) -> tuple[int, int] | None:
    """The device and inode of the file at a path; None if it is missing or cannot be examined."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def cannot_make(path: Path, error: OSError, what: str) -> JournalError:
    """The error for a file or folder that cannot be made or written.

    Args:
        path: The file or folder.
        error: The system's error.
        what: What cannot be done; it follows the path in the message.
    """
    if may_pass(error):
        return JournalError(f"{path}: {what}: {error.strerror}. If the disk is full, make room")
    return UnusableJournalError(
        f"{path}: {what}: {error.strerror}. The journal's folder must belong to the user that runs vodpoller; create"
        " it so, or set journal.path to such a place"
    )


def cannot_open(path: Path, error: sqlite3.Error) -> JournalError:
    """The error for a journal that SQLite cannot open or migrate to this version."""
    code = _code_of(error)
    if code in _UNUSABLE or not code:  # without a code it is the verdict of quick_check
        return UnusableJournalError(corruption_message(path, error))
    if code in _FORBIDDEN:
        return UnusableJournalError(
            f"{path}: the journal cannot be opened: {error}. It and its folder must belong to the user that runs"
            " vodpoller, and be on a file system that can be written; or set journal.path to such a place"
        )
    return JournalError(f"{path}: the journal cannot be opened: {error}. Is the disk full or the folder read-only?")


def is_corrupt(error: Exception) -> bool:
    """Whether an error shows that the file is damaged, so that waiting does not help."""
    return _code_of(error) in _CORRUPT


def corruption_message(path: Path, error: Exception) -> str:
    """The message for a corrupt journal, with all that the operator can do.

    Args:
        path: The journal.
        error: SQLite's error.
    """
    return (
        f"{path}: the journal is corrupt ({error}). Stop vodpoller and keep a copy of {path} and {path}-wal. Then"
        f" rescue what can be read, `sqlite3 {path} .recover | sqlite3 {path}.new`, and put that in its place without"
        f" the old {path.name}-wal and -shm; or move the journal away, and a new one is made: what was stored is in the"
        ' copy only. In both cases some events may be delivered twice. README, "A corrupt journal", has each step'
    )


def _code_of(error: Exception) -> int:
    """SQLite's primary result code, 0 for an error that is not SQLite's."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
