"""The sink `download`. For each image of an event: its path, the check whether it exists, fetching, saving."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final

from vodpoller.durable import Folders, check_access, existing_folder, may_pass, why
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import Event
from vodpoller.events.snapshots import Snapshot, SnapshotsTaken, snapshots_of
from vodpoller.logs import RepeatLimiter
from vodpoller.sinks.contract import Sink, SinkContext
from vodpoller.sinks.download.config import DownloadConfig
from vodpoller.sinks.download.fetching import SHOWN_CHARACTERS, Fetcher, Fetching, media_type_of
from vodpoller.sinks.download.path_template import (
    EXTENSIONS,
    FIELDS,
    OTHER_EXTENSION,
    PathTemplate,
    extension_in,
    safe_name,
)
from vodpoller.sinks.download.saving import HINTS_BELOW_ROOT, WRITABLE, ImageFolder

_SHOWN_FAILURES: Final = 3
_REMEMBERED_TYPES: Final = 1000


class DownloadSink(Sink[DownloadConfig]):
    """Saves the images of snapshot events.

    An event is accepted when each image that VOD could take is saved and synced. A file appears under its final name
    only when it is complete, so an existing file is not fetched again; if it belongs to another event, this is logged.
    If one image fails, the others are saved nevertheless. Images that VOD could not take, and events without images,
    are logged and accepted.

    Args:
        name: Name of the sink.
        config: Its settings.
        context: The log and the clocks.
        resolve: Used instead of `socket.getaddrinfo`, if given.
        write: Used instead of `os.write`.

    Raises:
        ConfigError: The folder cannot be created or written, or the proxy or certificate settings of the environment
            cannot be used.
        TransientError: The disk is full or failing.
    """

    Config = DownloadConfig

    def __init__(
        self,
        name: str,
        config: DownloadConfig,
        context: SinkContext,
        *,
        resolve: Callable[..., list[Any]] | None = None,
        write: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        super().__init__(name, config, context)
        self.concurrency = config.concurrency
        self.batch_events = 1
        self.timeout_secs = config.timeout_secs
        self._template = PathTemplate(config.path)
        self._closed = False
        folders = Folders(lambda text: context.log.warning("config.warning", message=f"sinks.{name}.path: {text}"))
        repeats = RepeatLimiter(context.log, monotonic=context.monotonic)
        self._images = ImageFolder(name, self._template, folders=folders, repeats=repeats, write=write)
        self._unsuitable_types: set[str] = set()
        self._fetcher = Fetcher(name, config, resolve=resolve, wall=context.wall, monotonic=context.monotonic)
        try:
            self._images.prepare()
        except OSError as error:
            problem = f"sinks.{name}.path: {error.filename or self._images.root}: {why(error)}"
            raise (TransientError(problem) if may_pass(error) else ConfigError([problem])) from error

    @classmethod
    def probe(cls, name: str, config: DownloadConfig, context: SinkContext) -> str:
        """Check that the folder can be written or created. No host is contacted, since only events name them."""
        root = PathTemplate(config.path).root
        try:
            folder = existing_folder(root)
            check_access(folder, WRITABLE)
        except OSError as error:
            raise ConfigError([f"sinks.{name}.path: {error.filename or root}: {why(error)}"]) from error
        return f"{root} can be {'written' if folder == root else 'created'}"

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Save the images of one event. The time limit is for fetching; writing to a disk cannot be cancelled."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._images.root}: the sink is closed")
        taken = snapshots_of(event)
        if taken is None:
            self._log_unsuitable(event)
            return
        fetching = Fetching(timeout_secs=timeout_secs, ends_at=self.context.monotonic() + timeout_secs, urls={})
        failed_at_vod = frozenset(taken.failed)
        failures: list[RejectedError | TransientError] = []
        for index, snapshot in enumerate(taken.snapshots):
            if snapshot in failed_at_vod:
                self._log_skipped(event, _failed_at_vod(snapshot))
                continue
            try:
                self._save(snapshot.url, self._values(event, taken, index, snapshot), fetching)
            except (RejectedError, TransientError) as error:
                failures.append(error)
        if not taken.snapshots:
            self._log_skipped(event, "the event names no image, so there is nothing to download")
        if failures:
            raise _summary(failures, len(taken.snapshots))

    def reopen(self) -> None:
        """Read the trusted CA certificates again.

        Raises:
            ConfigError: They cannot be read; those that were read before stay in use.
        """
        self._fetcher.reread_roots()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their image has been read."""
        self._closed = True
        self._fetcher.close()

    def _log_unsuitable(self, event: Event) -> None:
        shown = event.type[:SHOWN_CHARACTERS]
        if shown not in self._unsuitable_types and len(self._unsuitable_types) < _REMEMBERED_TYPES:
            self._unsuitable_types.add(shown)
            self.context.log.warning(
                "image.skipped",
                key=event.key.hex(),
                event_type=shown,
                message=f"events of type {shown!r} hold no snapshots, so they are accepted without an action",
                hint="does the route need event_types?",
            )

    def _log_skipped(self, event: Event, message: str) -> None:
        self.context.log.warning("image.skipped", key=event.key.hex(), message=message)

    # --- one image ---

    @staticmethod
    def _values(event: Event, taken: SnapshotsTaken, index: int, snapshot: Snapshot) -> dict[str, str]:
        """The values of all fields but `ext`, which may be known only from the answer."""
        values = {
            "file_id": taken.file_id,
            "task_id": taken.task_id,
            "time_offset_ms": "" if snapshot.time_offset_ms is None else str(snapshot.time_offset_ms),
            "definition": "" if taken.definition is None else str(taken.definition),
            "index": str(index),
            "key": event.key.hex(),
        }
        return {name: safe_name(value, FIELDS[name]) for name, value in values.items()}

    def _save(self, url: str, values: dict[str, str], fetching: Fetching) -> None:
        extension = extension_in(url)
        if extension or "ext" not in self._template.fields:
            parts = self._parts(values, extension, url, fetching)
            if self._images.is_there(parts, values["key"]):
                return
        with closing(self._fetcher.fetch(url, fetching)) as response:
            self._fetcher.check(response)
            if not extension:
                extension = EXTENSIONS.get(media_type_of(response), OTHER_EXTENSION)
                parts = self._parts(values, extension, url, fetching)
                if self._images.is_there(parts, values["key"]):
                    return
            try:
                self._images.store(parts, self._fetcher.body(response, fetching), values["key"])
            except OSError as error:
                path = self._images.root.joinpath(*parts)
                raise TransientError(f"{path} was not saved: {why(error, HINTS_BELOW_ROOT)}") from error

    def _parts(self, values: dict[str, str], extension: str, url: str, fetching: Fetching) -> tuple[str, ...]:
        """The path below the root.

        Raises:
            RejectedError: Another image of the event has the same path.
        """
        parts = tuple(self._template.below_root({**values, "ext": extension}))
        if fetching.urls.setdefault(parts, url) != url:
            path = self._images.root.joinpath(*parts)
            raise RejectedError(
                f"two images of the event would go to {path} (put {{index}} into sinks.{self.name}.path)"
            )
        return parts


def _failed_at_vod(snapshot: Snapshot) -> str:
    code = str(snapshot.err_code)[:SHOWN_CHARACTERS]
    return (
        f"VOD could not take the image at {snapshot.time_offset_ms} ms (ErrCode {code}): there is nothing to download"
    )


def _summary(failures: Sequence[RejectedError | TransientError], images: int) -> RejectedError | TransientError:
    """One error for the event. It is transient if any failure is, so that the event is tried again."""
    transient = [error for error in failures if isinstance(error, TransientError)]
    shown = transient or failures
    text = "; ".join(str(error) for error in shown[:_SHOWN_FAILURES])
    if images > 1:
        text = f"{len(failures)} of {images} images were not saved: {text}"
    if not transient:
        return RejectedError(text)
    return TransientError(
        text, retry_after_secs=max((e.retry_after_secs for e in transient if e.retry_after_secs), default=None)
    )
