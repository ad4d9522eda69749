"""Saving images inside one folder: complete, synced, and without replacing the image of another event."""

import errno
import fcntl
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from vodpoller.durable import HINTS, Folders, check_access
from vodpoller.logs import RepeatLimiter
from vodpoller.sinks.download.path_template import PathTemplate

WRITABLE: Final = os.R_OK | os.W_OK | os.X_OK  # the rights that this user needs in the folder
_REMEMBERED: Final = 1000
_TEMPORARY: Final = re.compile(r"\.vodpoller-[0-9a-f]{16}\.part")

# Below the root, symbolic links are not followed.
HINTS_BELOW_ROOT: Final = {
    **HINTS,
    errno.ENOTDIR: "a part of the path is a file or a symbolic link, which is not followed",
}

# The extended attribute (xattr(7)) that holds the key of the image's event, if the file system supports it.
_KEY_ATTRIBUTE: Final = "user.vodpoller.key"


class ImageFolder:
    """The folder below which images are saved.

    Args:
        name: The sink's name, for log lines.
        template: The template of the images' paths.
        folders: Creates and syncs folders.
        repeats: Destination of log lines.
        write: Used instead of `os.write`.

    Attributes:
        root: The folder outside of which nothing is written.
    """

    def __init__(
        self,
        name: str,
        template: PathTemplate,
        *,
        folders: Folders,
        repeats: RepeatLimiter,
        write: Callable[[int, memoryview], int],
    ) -> None:
        self.root = template.root
        self._name = name
        self._template = template
        self._folders = folders
        self._repeats = repeats
        self._write = write
        # Held while a file gets its final name, so that of two images with the same path only one is saved.
        self._naming = threading.Lock()
        self._saved_keys: dict[tuple[str, ...], str] = {}
        self._cleaned: set[tuple[str, ...]] = set()

    def prepare(self) -> None:
        """Create the folder, if it is missing.

        Raises:
            OSError: It cannot be created or written.
        """
        self._folders.make(self.root)
        check_access(self.root, WRITABLE)

    def is_there(self, parts: tuple[str, ...], key: str) -> bool:
        """Whether an image's file exists. Logs a warning if the file is not known to be of the same event."""
        try:
            with self._folder(parts[:-1], make=False) as folder:
                saved_key = self._key_of_file(folder, parts)
        except OSError:  # `store` will report it
            return False
        if saved_key is not None:
            self._log_skipped(parts, key, saved_key)
        return saved_key is not None

    def _key_of_file(self, folder: int, parts: tuple[str, ...]) -> str | None:
        """The key of the event whose image a file holds; empty if it is not known, None without a file."""
        try:
            status = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        with suppress(OSError):  # the attribute is missing or not supported, or the file cannot be read
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                return os.getxattr(fd, _KEY_ATTRIBUTE).decode("ascii", "replace")
            finally:
                os.close(fd)
        return self._saved_keys.get(parts, "")

    def _log_skipped(self, parts: tuple[str, ...], key: str, saved_key: str) -> None:
        if saved_key == key or "key" in self._template.fields:
            return
        path = str(self.root.joinpath(*parts))
        self._repeats.log_once(
            "warning",
            "image.skipped",
            cause=f"{key} {path}",
            key=key,
            path=path,
            held_by=saved_key or "unknown",
            hint=f"the file is kept; put {{definition}} and {{task_id}} in sinks.{self._name}.path to separate events",
        )

    def store(self, parts: tuple[str, ...], body: Iterator[bytes], key: str) -> None:
        """Write a temporary file, sync it, rename it, sync the folder. An existing file is kept, with a warning."""
        with self._folder(parts[:-1], make=True) as folder:
            temporary, fd = self._temporary(folder, parts[:-1])
            try:
                for chunk in body:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[self._write(fd, rest) :]
                with suppress(OSError):  # a file system without attributes: see `_remember`
                    os.setxattr(fd, _KEY_ATTRIBUTE, key.encode())
                os.fsync(fd)
                with self._naming:
                    saved_key = self._key_of_file(folder, parts)
                    if saved_key is None:
                        os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
                        self._remember(parts, key)
                if saved_key is not None:
                    os.unlink(temporary, dir_fd=folder)
                    self._log_skipped(parts, key, saved_key)
                self._folders.sync(self.root.joinpath(*parts[:-1]), folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            finally:
                os.close(fd)

    def _temporary(self, folder: int, folders: tuple[str, ...]) -> tuple[str, int]:
        """Create a temporary file, locked so that `_remove_leftovers` keeps it. Returns its name and descriptor."""
        name = f".vodpoller-{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._naming:  # before it is locked, another thread would remove it as a leftover
            self._remove_leftovers(folder, folders)
            fd = os.open(name, flags, 0o640, dir_fd=folder)
            with suppress(OSError):  # a file system without locks: leftovers stay
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return name, fd

    def _remember(self, parts: tuple[str, ...], key: str) -> None:
        """Remember the key of a saved file, for file systems without attributes: its event may come again soon."""
        if len(self._saved_keys) >= _REMEMBERED:
            del self._saved_keys[next(iter(self._saved_keys))]
        self._saved_keys[parts] = key

    @contextmanager
    def _folder(self, names: Sequence[str], *, make: bool) -> Iterator[int]:
        """Open a folder below the root, name by name, without following symbolic links."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(self.root, flags)
        path = self.root
        try:
            for name in names:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o750, dir_fd=fd)
                    self._folders.sync(path, fd)  # always: the process that created it may have ended before this step
                path /= name
                outer, fd = fd, os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
                os.close(outer)
            yield fd
        finally:
            os.close(fd)

    def _remove_leftovers(self, folder: int, names: tuple[str, ...]) -> None:
        """At the first use of a folder, remove the temporary files of a process that was killed."""
        if names in self._cleaned:
            return
        if len(self._cleaned) >= _REMEMBERED:
            self._cleaned.clear()
        self._cleaned.add(names)
        for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
            with suppress(OSError):  # it is in use, already removed, or on a file system without locks
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(fd)
