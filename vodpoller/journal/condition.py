"""The condition of an open journal: whether it can be read and written, why not, and what was said of it."""

from pathlib import Path

from vodpoller.errors import StorageError
from vodpoller.journal.place import identity_of, is_corrupt, way_out
from vodpoller.telemetry import Count, Scope


class Condition:
    """What is known of a journal's file without touching it.

    Args:
        path: The file, which is there.
        telemetry: Destination of log lines and counts.

    Attributes:
        is_failing: Whether the last attempt to read or write it failed.
        is_replaced: Whether it was deleted or replaced when it was looked at last.
        corrupt: What to do if it is corrupt; once found, it is so until the next start. Empty if it is not.
        trouble: What was said last about why it could not be read or written.
    """

    def __init__(self, path: Path, telemetry: Scope) -> None:
        self._path = path
        self._identity = identity_of(path)
        self._telemetry = telemetry
        self.is_failing = False
        self.is_replaced = False
        self.corrupt = ""
        self.trouble = ""

    @property
    def remedy(self) -> str:
        """What to do, if that does not follow from `trouble`."""
        if self.corrupt:
            return 'Stop vodpoller and keep a copy; README, "A corrupt journal", has each step'
        return "Put the file back if you can, and restart vodpoller" if self.is_replaced else ""

    def check_in_place(self) -> None:
        """What is written to a file that was deleted or replaced is lost at the next start.

        Raises:
            StorageError: That happened.
        """
        self.is_replaced = identity_of(self._path) != self._identity
        if self.is_replaced:
            error = StorageError(
                f"{self._path}: the journal was deleted or replaced while it was open: put it back if you can, and"
                " restart vodpoller; until then events stay with VOD"
            )
            self.trouble = str(error)
            self._telemetry.repeated("error", "journal.failed", cause="replaced", **error.fields())
            raise error

    def note_failure(self, error: Exception) -> None:
        """Note and log that it could not be read or written."""
        self.is_failing = True
        message = str(error)
        if is_corrupt(error):
            message = self.corrupt = way_out(self._path, error)
        self.trouble = message
        self._telemetry.count(Count.JOURNAL_ERRORS)
        self._telemetry.repeated("error", "journal.failed", cause=message, error_message=message, path=str(self._path))

    def note_success(self) -> None:
        """Note that it was written; log it, if it could not be before."""
        if self.is_failing and not self.corrupt:
            self.is_failing = False
            suppressed = self._telemetry.reset()
            self._telemetry.log.info("journal.recovered", suppressed_lines=suppressed or 0)
