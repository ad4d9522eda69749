"""Checks whether a file can be opened or created, without doing so."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from vodpoller.durable import check_access, existing_folder, is_locked, kind_of_file

_INSTEAD = {
    "a named pipe": 'use a sink of type "exec" with a program that writes to it, or type "stdout"',
    "a socket": 'use a sink of type "webhook" or "exec"',
    "a device": 'for standard output use a sink of type "stdout"',
}


def check_kind(mode: int, path: Path) -> None:
    """Raise an OSError that says what to use instead, if the mode is not that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = kind_of_file(mode)
        instead = f", or {_INSTEAD[kind]}" if kind in _INSTEAD else ""
        text = f"it is not a regular file (give the path of a regular file{instead}: this is {kind})"
        raise OSError(errno.ENXIO, text, str(path))


def check_is_file(path: Path) -> None:
    """Raise the OSError that opening the path would raise, before other files are created beside it."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        check_kind(mode, path)


def check_path(path: Path, lock_path: Path) -> str:
    """Check whether the file can be opened, without opening it.

    Returns:
        One line that says what was found.

    Raises:
        OSError: It cannot be opened.
    """
    folder = existing_folder(path.parent)
    exists, lock_exists = path.exists(), lock_path.exists()
    # The folder must be readable, too, since it is opened to be synced.
    check_access(folder, os.R_OK | os.X_OK | (0 if exists and lock_exists else os.W_OK))
    if exists:
        check_kind(path.stat().st_mode, path)
        check_access(path, os.R_OK | os.W_OK)
    if lock_exists:
        check_access(lock_path, os.R_OK | os.W_OK)
    if is_locked(lock_path):
        return f"{path} is in use by another process (the running daemon?)"
    return f"{path} can be {'written' if exists else 'created'}"


def path_of(error: OSError, path: Path) -> str:
    """The path that an error names, or else the path of the file."""
    return str(error.filename or path)
