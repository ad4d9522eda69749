"""Checks of the free space on the disks of the journal and of the files of sinks."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from vodpoller.checkup.finding import Finding, Level
from vodpoller.checkup.places import files_of_sinks
from vodpoller.config.model import Config
from vodpoller.durable import existing_folder

_MIB: Final = 1024 * 1024


def check_disks(config: Config, *, look: Callable[[Path], os.statvfs_result] = os.statvfs) -> Iterator[Finding]:
    """Find full disks, and whether the journal has space to grow to its limit.

    Args:
        config: Valid.
        look: Returns the state of a file system.
    """
    journal = config.journal.path
    known_devices: set[int] = set()
    for path in (journal, *files_of_sinks(config)):
        with suppress(OSError):  # the check of the journal or sink reports the problem
            folder = existing_folder(path.parent)
            if (device := folder.stat().st_dev) in known_devices:
                continue
            known_devices.add(device)
            yield _disk_finding(folder, look(folder), wanted_bytes=_missing_bytes(config) if path == journal else 0)


def _missing_bytes(config: Config) -> int:
    """Number of bytes by which the journal may still grow."""
    path = config.journal.path
    return max(0, config.journal.max_bytes - (path.stat().st_size if path.exists() else 0))


def _disk_finding(folder: Path, disk: os.statvfs_result, *, wanted_bytes: int) -> Finding:
    free_bytes = disk.f_bavail * disk.f_frsize  # the free space for users other than root
    what = f"disk of {folder}"
    if free_bytes == 0 or (disk.f_files and disk.f_favail == 0):
        lacking = "space" if free_bytes == 0 else "inodes"
        return Finding(
            what=what,
            level=Level.PROBLEM,
            text=f"it is full: no {lacking} left, and nothing more can be written",
            remedy="make room there: df -h and df -i show what is used",
        )
    if free_bytes < wanted_bytes:
        return Finding(
            what=what,
            level=Level.WARNING,
            text=f"it has {free_bytes // _MIB} MiB left, and the journal may grow by {wanted_bytes // _MIB} MiB"
            " (journal.max_bytes)",
            remedy="make room there, or lower journal.max_bytes: a full disk stops all events, a full journal only"
            " those that must be stored",
        )
    return Finding(what=what, level=Level.GOOD, text=f"{free_bytes // _MIB} MiB left")
