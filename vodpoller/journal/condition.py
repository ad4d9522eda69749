"""The condition of an open journal: whether it can be read and written, and why not."""

from pathlib import Path

from vodpoller.errors import StorageError
from vodpoller.journal.place import corruption_message, device_and_inode, is_corrupt
from vodpoller.telemetry import Count, Scope


class Condition:
    """What is known about a journal's file without reading or writing it.

    Args:
        path: The file; it exists.
        telemetry: Destination of log lines and counts.

    Attributes:
        is_failing: Whether the last attempt to read or write it failed.
        is_replaced: Whether it was deleted or replaced when it was last checked.
        corrupt: What to do if it is corrupt; this stays until the next start. Empty if it is not corrupt.
        trouble: The last error text about why it could not be read or written.
    """

    def __init__(self, path: Path, telemetry: Scope) -> None:
        self._path = path
        self._device_and_inode = device_and_inode(path)
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
        """Check that the file was not deleted or replaced: what is written to it then is lost at the next start.

        Raises:
            StorageError: It was deleted or replaced.
        """
        self.is_replaced = device_and_inode(self._path) != self._device_and_inode
        if self.is_replaced:
            error = StorageError(
                f"{self._path}: the journal was deleted or replaced while it was open: put it back if you can, and"
                " restart vodpoller; until then events stay with VOD"
            )
            self.trouble = str(error)
            self._telemetry.repeated("error", "journal.failed", cause="replaced", **error.fields())
            raise error

    def note_failure(self, error: Exception) -> None:
        """Record and log that it could not be read or written."""
        self.is_failing = True
        message = str(error)
        if is_corrupt(error):
            message = self.corrupt = corruption_message(self._path, error)
        self.trouble = message
        self._telemetry.count(Count.JOURNAL_ERRORS)
        self._telemetry.repeated("error", "journal.failed", cause=message, error_message=message, path=str(self._path))

    def note_success(self) -> None:
        """Record that it was written, and log the recovery if it could not be written before."""
        if self.is_failing and not self.corrupt:
            self.is_failing = False
            suppressed = self._telemetry.reset()
            self._telemetry.log.info("journal.recovered", suppressed_lines=suppressed or 0)
