"""Folders that survive a loss of power, locks that keep other processes out, and causes and remedies of errors."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

LOCK_WAIT_SECS: Final = 1.0
_LOCK_POLL_SECS: Final = 0.01

# Errors of a file system that cannot sync a folder at all, such as CIFS and 9p: fsync(2), "EROFS, EINVAL".
_CANNOT_SYNC: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})

# Errors that can go away without a change of the configuration: a start that fails with one of them can be repeated.
_PASSING: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)

HINTS: Final[Mapping[int, str]] = {
    errno.EACCES: "the user that runs vodpoller needs the right to write there",
    errno.EDQUOT: "free space, or raise the quota",
    errno.EIO: "the disk fails: see dmesg",
    errno.EISDIR: "give the path of a file, not of a folder",
    errno.ELOOP: "a part of the path is a symbolic link, which is not followed",
    errno.EMFILE: "too many open files; under systemd see LimitNOFILE=",
    errno.ENOENT: "was it removed or unmounted?",
    errno.ENOLCK: "this file system has no locks, as NFS without its lock service: use a local disk",
    errno.ENOSPC: "free space on that disk",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EPERM: "the user that runs vodpoller needs the right to write there",
    errno.EROFS: "that disk is mounted read-only; under systemd see ReadWritePaths= and StateDirectory=",
}

_KINDS: Final = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def why(error: OSError, hints: Mapping[int, str] = HINTS) -> str:
    """The system's text of an error, and what to do about it if that is known.

    Args:
        error: The error.
        hints: What to do, by `errno`.
    """
    text = error.strerror or str(error)
    hint = hints.get(error.errno or 0)
    return f"{text} ({hint})" if hint else text


def may_pass(error: OSError) -> bool:
    """Whether a later attempt can succeed; if not, a person must change something."""
    return error.errno in _PASSING


def kind_of_file(mode: int) -> str:
    """What a path names: "a file", "a folder", "a named pipe", "a socket", "a device".

    Args:
        mode: `st_mode` of os.stat.
    """
    return next((kind for fits, kind in _KINDS if fits(mode)), "something unknown")


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists.

    Raises:
        NotADirectoryError: What exists is not a folder.
        OSError: The path cannot be examined.
    """
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return path


def check_access(path: Path, mode: int) -> None:
    """Check whether this user may use a file or folder, without using it.

    Args:
        path: A path that exists.
        mode: As for os.access.

    Raises:
        OSError: The same error that its use would raise, with the path as its file name.
    """
    if not os.access(path, mode):
        read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(path))


def make_folder(path: Path) -> None:
    """Make one folder of mode 0750, less the umask. It is not an error if another process has just made it.

    Raises:
        OSError: It cannot be made.
    """
    try:
        path.mkdir(0o750, exist_ok=True)
    except FileExistsError:  # something else has the name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def sync_folder(path: Path) -> None:
    """Make sure that the names in a folder survive a loss of power.

    Raises:
        OSError: It is not certain that they do.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Folders:
    """Makes and syncs folders, also on file systems that cannot sync folders.

    On such a file system a name can be lost only if the power fails and its server loses the name. It would be worse
    not to start at all.

    Args:
        warn: Called once, with one sentence, if a folder cannot be synced for that reason.
        make: Makes one folder, as `make_folder` does.
        sync: Syncs one folder, as `sync_folder` does.
    """

    def __init__(
        self,
        warn: Callable[[str], object],
        *,
        make: Callable[[Path], None] = make_folder,
        sync: Callable[[Path], None] = sync_folder,
    ) -> None:
        self._warn = warn
        self._make = make
        self._sync = sync
        self._has_warned = False

    def make(self, folder: Path) -> None:
        """Make a folder with what is missing above it, each synced into the one above.

        Raises:
            OSError: It cannot be made, or it is not certain that it survives a loss of power.
        """
        missing = []
        place = folder
        while not place.is_dir():
            missing.append(place)
            place = place.parent
        for new in reversed(missing):
            self._make(new)
            self.sync(new.parent)

    def sync(self, folder: Path, fd: int | None = None) -> None:
        """Make sure that the names in a folder survive a loss of power, as far as its file system can do so.

        Args:
            folder: Its path.
            fd: Its descriptor, if it is open: then the path is used only for the warning.

        Raises:
            OSError: It is not certain that they do.
        """
        try:
            if fd is None:
                self._sync(folder)
            else:
                os.fsync(fd)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"{folder} is on a file system that cannot sync folders ({error.strerror}): the name of a new file"
                    " there may be lost with the power (a local disk would keep it)"
                )


def take_lock(path: Path, *, wait_secs: float = LOCK_WAIT_SECS) -> int:
    """Keep other processes out: flock(2) on a file of mode 0640, less the umask, that is made if it is missing.

    Args:
        path: The lock file.
        wait_secs: Maximum wait for another process: one that only checks the lock has it for an instant.

    Returns:
        The descriptor; closing it gives the lock back.

    Raises:
        BlockingIOError: Another process has the lock.
        OSError: The file cannot be made or opened, or its file system has no locks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        _wait_for_lock(fd, wait_secs)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            error.filename = str(path)  # flock(2) knows only the descriptor
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Whether another process has the lock. To find out, a shared lock is taken for an instant.

    Args:
        path: As for `take_lock`. A file that is not there is not locked.

    Raises:
        OSError: The file cannot be opened, or its file system has no locks.
    """
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return not _try_lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)
    return False


def _wait_for_lock(fd: int, wait_secs: float) -> None:
    ends_at = time.monotonic() + wait_secs
    while not _try_lock(fd, fcntl.LOCK_EX):
        if time.monotonic() >= ends_at:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")
        time.sleep(_LOCK_POLL_SECS)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
