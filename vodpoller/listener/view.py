"""What the listener shows of the process and of the daemon that it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vodpoller.secret import Secret
from vodpoller.status import Status
from vodpoller.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may ask for more than the two probes.

    Args:
        hosts: The hosts by which it may be asked, as a browser writes them, in lower case, without ports.
        password: None if nothing needs one.
    """

    hosts: frozenset[str]
    password: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How the process is. What is called may be called from several threads at once.

    Args:
        access: Who may ask.
        telemetry: What was counted and measured.
        journal_path: The journal, which is read for the dead letters of the page.
        is_ready: Whether it pulls: from the moment at which the service manager is told so until it stops.
        overdue: The threads that are overdue, by what they do, with the time since then, in seconds.
        known: How it is, without touching a disk.
        report: The object of `vodpoller status --json`. Waits for the journal, which is written to.
        cleared: Takes secrets out of what others said.
        clock_offset_secs: What must be added to this machine's clock to get VOD's; None if that is not known.
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
