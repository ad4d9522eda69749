"""The data of the process and its daemon that the listener shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vodpoller.secret import Secret
from vodpoller.status import Status
from vodpoller.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The conditions for access to all paths except the two probes.

    Args:
        hosts: The permitted values of the header `Host`, in lower case, without ports.
        password: The password; None if none is needed.
    """

    hosts: frozenset[str]
    password: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The state of the process. Several threads may call the functions at the same time.

    Args:
        access: The conditions for access.
        telemetry: Counts and measurements.
        journal_path: The path of the journal, which is read for the stored events of the page.
        is_ready: Whether the daemon is ready: from the notification of the service manager until the daemon stops.
        overdue: The overdue threads, by their current work, with the time in seconds by which they are overdue.
        known: The status that is available without access to a disk.
        report: The object of `vodpoller status --json`. Waits for a write to the journal.
        cleared: Returns a value without the secrets that texts in it may contain.
        clock_offset_secs: VOD's time minus this machine's time, in seconds; None if it is not known.
    """

    access: Access
    telemetry: Telemetry
    journal_path: Path
    is_ready: Callable[[], bool]
    overdue: Callable[[], Mapping[str, float]]
    known: Callable[[], Status]
    report: Callable[[], Mapping[str, Any]]
    cleared: Callable[[Any], Any]
    clock_offset_secs: Callable[[], float | None]
