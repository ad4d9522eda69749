"""Typed access to an event's ids and snapshots, for log lines, sinks and the demo.

Facts are from Tencent Cloud's "Event overview" (266/33948) and from its samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vodpoller.events.event import Event

SNAPSHOT_EVENT_TYPE = "CreateSnapshotByTimeOffsetComplete"
_SUCCESS = (0, "0")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One image of a snapshot task (`SnapshotByTimeOffsetTaskOutput`, "Event overview").

    Args:
        time_offset_ms: Its position in the video, in milliseconds; None if it is missing.
        url: The URL of the image; empty if the snapshot failed.
        err_code: 0 for success.
    """

    time_offset_ms: int | None
    url: str
    err_code: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotsTaken:
    """A `CreateSnapshotByTimeOffsetComplete` event: the task and its results.

    Args:
        task_id: Tencent's id of the task.
        file_id: Tencent's id of the video.
        definition: Id of the snapshot template.
        snapshots: The images, including failed ones.
    """

    task_id: str
    file_id: str
    definition: int | None
    snapshots: tuple[Snapshot, ...]

    @property
    def failed(self) -> tuple[Snapshot, ...]:
        """The images that could not be taken."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.err_code not in _SUCCESS)


def payload_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The member that holds the payload: the first object, since the event type does not determine its name."""
    for value in content.values():
        if isinstance(value, dict):
            return value
    return {}


def _id_in(payload: Mapping[str, Any], content: Mapping[str, Any], name: str) -> str:
    """A string or integer member with this name: of the payload, else of an object in it, else of the event."""
    found = _id(payload.get(name))
    if found:
        return found
    inner = (_id(value.get(name)) for value in payload.values() if isinstance(value, dict))
    return next(filter(None, inner), "") or _id(content.get(name))


def _id(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def task_id_of(event: Event) -> str:
    """Tencent's id of the task that ended; empty if the event has none."""
    return _id_in(payload_of(event.content), event.content, "TaskId")


def file_id_of(event: Event) -> str:
    """Tencent's id of the video, with all digits; empty if the event has none."""
    return _id_in(payload_of(event.content), event.content, "FileId")


def event_fields(event: Event) -> dict[str, str]:
    """The ids by which a log line names an event."""
    payload = payload_of(event.content)
    return {
        "source": event.source,
        "event_type": event.type,
        "key": event.key.hex(),
        "task_id": _id_in(payload, event.content, "TaskId"),
        "file_id": _id_in(payload, event.content, "FileId"),
    }


def has_failed_snapshots(event: Event) -> bool:
    """Whether the event is a snapshot event with at least one snapshot that failed."""
    payload = event.content.get("SnapshotByTimeOffsetCompleteEvent")
    images = payload.get("SnapshotInfoSet") if isinstance(payload, dict) else None
    return isinstance(images, list) and any(
        isinstance(image, dict) and image.get("ErrCode", 0) not in _SUCCESS for image in images
    )


def snapshots_of(event: Event) -> SnapshotsTaken | None:
    """The typed content of a snapshot event; None for any other event.

    Fields that are missing or of another type than documented are empty or None; the event is delivered anyway.
    """
    payload = event.content.get("SnapshotByTimeOffsetCompleteEvent")
    if not isinstance(payload, dict):
        return None
    images = payload.get("SnapshotInfoSet")
    return SnapshotsTaken(
        task_id=task_id_of(event),
        file_id=file_id_of(event),
        definition=_typed(payload, "Definition", int),
        snapshots=tuple(_snapshot(image) for image in images if isinstance(image, dict))
        if isinstance(images, list)
        else (),
    )


def _snapshot(image: Mapping[str, Any]) -> Snapshot:
    err_code = image.get("ErrCode", 0)
    return Snapshot(
        time_offset_ms=_typed(image, "TimeOffset", int),
        url=_typed(image, "Url", str) or "",
        err_code=err_code if isinstance(err_code, int | str) else 0,
    )


def _typed(place: Mapping[str, Any], name: str, kind: type[_T]) -> _T | None:
    value = place.get(name)
    return value if isinstance(value, kind) else None
