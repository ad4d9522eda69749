"""The sink that saves images: for each of an event, where it goes, whether it is there, fetching, saving."""

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
from vodpoller.sinks.download.places import EXTENSIONS, FIELDS, OTHER_EXTENSION, Places, extension_in, safe_name
from vodpoller.sinks.download.saving import HINTS_BELOW_ROOT, WRITABLE, ImageFolder

_SHOWN_FAILURES: Final = 3
_REMEMBERED_TYPES: Final = 1000


class DownloadSink(Sink[DownloadConfig]):
    """Saves the images of snapshot events.

    An event is accepted when each image that VOD could take is a file, synced. A file appears under its name only when
    it is whole, so one that exists is not fetched again; if it is another event's, that is logged. One image that fails
    does not keep the others from being saved. Images that VOD could not take, and events without images, are logged and
    accepted.

    Args:
        name: Of the sink.
        config: Its settings.
        context: The log and the clocks.
        resolve: In place of `socket.getaddrinfo`.
        write: In place of `os.write`.

    Raises:
        ConfigError: The folder cannot be made or written, or what the environment says of proxies or certificates
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
        self._places = Places(config.path)
        self._closed = False
        folders = Folders(lambda text: context.log.warning("config.warning", message=f"sinks.{name}.path: {text}"))
        repeats = RepeatLimiter(context.log, monotonic=context.monotonic)
        self._images = ImageFolder(name, self._places, folders=folders, repeats=repeats, write=write)
        self._unfit_types: set[str] = set()
        self._fetcher = Fetcher(name, config, resolve=resolve, wall=context.wall, monotonic=context.monotonic)
        try:
            self._images.prepare()
        except OSError as error:
            problem = f"sinks.{name}.path: {error.filename or self._images.root}: {why(error)}"
            raise (TransientError(problem) if may_pass(error) else ConfigError([problem])) from error

    @classmethod
    def probe(cls, name: str, config: DownloadConfig, context: SinkContext) -> str:
        """Whether the folder can be written, or made. No host is asked: which ones there are, only events say."""
        root = Places(config.path).root
        try:
            place = existing_folder(root)
            check_access(place, WRITABLE)
        except OSError as error:
            raise ConfigError([f"sinks.{name}.path: {error.filename or root}: {why(error)}"]) from error
        return f"{root} can be {'written' if place == root else 'made'}"

    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Save the images of one event. The time limit is that of fetching; writing to a disk cannot be given up."""
        (event,) = events
        if self._closed:
            raise TransientError(f"{self._images.root}: the sink is closed")
        taken = snapshots_of(event)
        if taken is None:
            self._say_unfit(event)
            return
        fetching = Fetching(timeout_secs=timeout_secs, ends_at=self.context.monotonic() + timeout_secs, urls={})
        failed_at_vod = frozenset(taken.failed)
        failures: list[RejectedError | TransientError] = []
        for index, snapshot in enumerate(taken.snapshots):
            if snapshot in failed_at_vod:
                self._say_skipped(event, _failed_at_vod(snapshot))
                continue
            try:
                self._save(snapshot.url, self._values(event, taken, index, snapshot), fetching)
            except (RejectedError, TransientError) as error:
                failures.append(error)
        if not taken.snapshots:
            self._say_skipped(event, "it names no image, so there is nothing to download")
        if failures:
            raise _summary(failures, len(taken.snapshots))

    def reopen(self) -> None:
        """Read what vouches for certificates again.

        Raises:
            ConfigError: It cannot be read; what was read before stays in use.
        """
        self._fetcher.reread_roots()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when their image is in."""
        self._closed = True
        self._fetcher.close()

    def _say_unfit(self, event: Event) -> None:
        shown = event.type[:SHOWN_CHARACTERS]
        if shown not in self._unfit_types and len(self._unfit_types) < _REMEMBERED_TYPES:
            self._unfit_types.add(shown)
            self.context.log.warning(
                "image.skipped",
                key=event.key.hex(),
                event_type=shown,
                message=f"events of type {shown!r} hold no snapshots: nothing is done for them",
                hint="does the route need event_types?",
            )

    def _say_skipped(self, event: Event, why_not: str) -> None:
        self.context.log.warning("image.skipped", key=event.key.hex(), message=why_not)

    # --- one image ---

    @staticmethod
    def _values(event: Event, taken: SnapshotsTaken, index: int, snapshot: Snapshot) -> dict[str, str]:
        """What is known for the fields; all but `ext`, which the answer may have to say."""
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
        if extension or "ext" not in self._places.fields:
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
                place = self._images.root.joinpath(*parts)
                raise TransientError(f"{place} was not saved: {why(error, HINTS_BELOW_ROOT)}") from error

    def _parts(self, values: dict[str, str], extension: str, url: str, fetching: Fetching) -> tuple[str, ...]:
        """The path below the root.

        Raises:
            RejectedError: Another image of the event goes there.
        """
        parts = tuple(self._places.below_root({**values, "ext": extension}))
        if fetching.urls.setdefault(parts, url) != url:
            place = self._images.root.joinpath(*parts)
            raise RejectedError(
                f"two images of the event would go to {place} (put {{index}} into sinks.{self.name}.path)"
            )
        return parts


def _failed_at_vod(snapshot: Snapshot) -> str:
    code = str(snapshot.err_code)[:SHOWN_CHARACTERS]
    return (
        f"VOD could not take the image at {snapshot.time_offset_ms} ms (ErrCode {code}): there is nothing to download"
    )


def _summary(failures: Sequence[RejectedError | TransientError], images: int) -> RejectedError | TransientError:
    """One error for the event: what may pass comes first, so that it is tried again before the rest is given up."""
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
