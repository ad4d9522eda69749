"""Saving an image: whole, synced, under a name that no other event's image had before, inside one folder."""

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
from vodpoller.sinks.download.places import Places

WRITABLE: Final = os.R_OK | os.W_OK | os.X_OK  # what this user must be allowed in the folder
_REMEMBERED: Final = 1000
_TEMPORARY: Final = re.compile(r"\.vodpoller-[0-9a-f]{16}\.part")

# Below the root, links are not followed.
HINTS_BELOW_ROOT: Final = {
    **HINTS,
    errno.ENOTDIR: "a part of the path is a file or a symbolic link, which is not followed",
}

# An image's file says of which event it is, if its file system can hold that (xattr(7)).
_OWNER: Final = "user.vodpoller.key"


class ImageFolder:
    """The folder below which images are saved.

    Args:
        name: The sink's name, for what it says.
        places: Where images go.
        folders: Makes and syncs folders.
        repeats: Destination of log lines.
        write: In place of `os.write`.

    Attributes:
        root: The folder that nothing leaves.
    """

    def __init__(
        self,
        name: str,
        places: Places,
        *,
        folders: Folders,
        repeats: RepeatLimiter,
        write: Callable[[int, memoryview], int],
    ) -> None:
        self.root = places.root
        self._name = name
        self._places = places
        self._folders = folders
        self._repeats = repeats
        self._write = write
        # Held while a file gets its name: of two events with the same name for their images, one is the first.
        self._naming = threading.Lock()
        self._owners: dict[tuple[str, ...], str] = {}
        self._tidied: set[tuple[str, ...]] = set()

    def prepare(self) -> None:
        """Make the folder, if it is missing.

        Raises:
            OSError: It cannot be made or written.
        """
        self._folders.make(self.root)
        check_access(self.root, WRITABLE)

    def is_there(self, parts: tuple[str, ...], key: str) -> bool:
        """Whether a file has an image's name; says so if it is not known to be of the same event."""
        try:
            with self._folder(parts[:-1], make=False) as folder:
                owner = self._owner(folder, parts)
        except OSError:  # it will be said by the step that writes
            return False
        if owner is not None:
            self._say_skipped(parts, key, owner)
        return owner is not None

    def _owner(self, folder: int, parts: tuple[str, ...]) -> str | None:
        """The key of the event whose image a file is; empty if that is not known, None if there is no file."""
        try:
            status = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        with suppress(OSError):  # it has no such attribute, or its file system has none, or it may not be read
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                return os.getxattr(fd, _OWNER).decode("ascii", "replace")
            finally:
                os.close(fd)
        return self._owners.get(parts, "")

    def _say_skipped(self, parts: tuple[str, ...], key: str, owner: str) -> None:
        if owner == key or "key" in self._places.fields:
            return
        place = str(self.root.joinpath(*parts))
        self._repeats.log_once(
            "warning",
            "image.skipped",
            cause=f"{key} {place}",
            key=key,
            path=place,
            held_by=owner or "unknown",
            hint=f"the file is kept; {{definition}} and {{task_id}} in sinks.{self._name}.path give each event its own",
        )

    def store(self, parts: tuple[str, ...], body: Iterator[bytes], key: str) -> None:
        """Write to a temporary file, sync it, give it its name, sync the name."""
        with self._folder(parts[:-1], make=True) as folder:
            temporary, fd = self._temporary(folder, parts[:-1])
            try:
                for chunk in body:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[self._write(fd, rest) :]
                with suppress(OSError):  # a file system without attributes: see _owners
                    os.setxattr(fd, _OWNER, key.encode())
                os.fsync(fd)
                with self._naming:
                    owner = self._owner(folder, parts)
                    if owner is None:
                        os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
                        self._remember(parts, key)
                if owner is not None:
                    os.unlink(temporary, dir_fd=folder)
                    self._say_skipped(parts, key, owner)
                self._folders.sync(self.root.joinpath(*parts[:-1]), folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            finally:
                os.close(fd)

    def _temporary(self, folder: int, folders: tuple[str, ...]) -> tuple[str, int]:
        """Name and descriptor of a new file, which is locked: that tells those who tidy up that it is in use."""
        name = f".vodpoller-{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._naming:  # until it is locked, another thread would take it for one that was left behind
            self._tidy(folder, folders)
            fd = os.open(name, flags, 0o640, dir_fd=folder)
            with suppress(OSError):  # a file system without locks: what is left behind stays
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return name, fd

    def _remember(self, parts: tuple[str, ...], key: str) -> None:
        """Whose image a file is, for file systems that cannot hold it: its event may come again soon."""
        if len(self._owners) >= _REMEMBERED:
            del self._owners[next(iter(self._owners))]
        self._owners[parts] = key

    @contextmanager
    def _folder(self, names: Sequence[str], *, make: bool) -> Iterator[int]:
        """A folder below the root, found name by name without following a symbolic link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(self.root, flags)
        place = self.root
        try:
            for name in names:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o750, dir_fd=fd)
                    self._folders.sync(place, fd)  # always: the process that made it may not have come to this step
                place /= name
                outer, fd = fd, os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
                os.close(outer)
            yield fd
        finally:
            os.close(fd)

    def _tidy(self, folder: int, names: tuple[str, ...]) -> None:
        """Remove what a run that was killed left in the folder, when it is first used."""
        if names in self._tidied:
            return
        if len(self._tidied) >= _REMEMBERED:
            self._tidied.clear()
        self._tidied.add(names)
        for name in filter(_TEMPORARY.fullmatch, os.listdir(folder)):
            with suppress(OSError):  # removed by another, or in use, or that is unknown without locks: it may stay
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(fd)
