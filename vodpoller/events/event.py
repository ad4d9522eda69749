"""What VOD says: the event, the lease it is held under, its identity, and how an answer is read.

Facts are from Tencent Cloud's API documents "PullEvents" (product/266/34183) and "Event overview" (266/33948), and from
their samples, which show every irregularity that is handled here.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

import orjson

SNAPSHOT_EVENT_TYPE = "CreateSnapshotByTimeOffsetComplete"

_SUCCESS = (0, "0")
DEPTH_MAX = 512  # levels of an event's objects and lists: half of what the json module of every Python can do

_HANDLE_MAX_CHARS = 64 * 1024  # a longer one could not be sent back beside fifteen others
_VALUES_MAX = 1_000_000  # each takes some 100 bytes of memory; in 8 MiB of VOD's events there are half of that
_TOO_DEEP = f"it is nested more than {DEPTH_MAX} levels deep"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The time in which the handles of one pull can be confirmed. It cannot be extended.

    Args:
        starts_at: Monotonic time, in seconds, at which the pull was sent: the earliest moment that VOD can have started
            to count.
        secs: How long it lasts; 30 at VOD.
    """

    starts_at: float
    secs: float

    @property
    def ends_at(self) -> float:
        """Monotonic time, in seconds, from which VOD may hand the events to another pull."""
        return self.starts_at + self.secs


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One `EventContent`, without its handle, which belongs to a pull and not to the event.

    Args:
        source: The name of the source that pulled it.
        sub_app_id: Tencent's SubAppId, None for an account without.
        type: `EventType` as it came, an open set; empty where the event has none.
        key: The identity, the same at every redelivery and after a restart: the content key, SHA-256 over SubAppId and
            canonical body; if the content has no id of its own, the key of the occurrence (see
            `vodpoller.events.identity`).
        body: The body of a v3.0 normal callback, UTF-8 JSON.
        content: The same, parsed. Not to be changed.
    """

    source: str
    sub_app_id: int | None
    type: str
    key: bytes
    body: bytes
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledEvent:
    """An event and the handle that confirms it while the lease lasts."""

    handle: str
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """What VOD sent in an event's place and cannot be read.

    Args:
        handle: What confirms it; None where not even that could be found, so that nothing can be done about it.
        event: The text as it came, as an event without content, to be stored as a dead letter.
        why: What is wrong, for a person.
    """

    handle: str | None
    event: Event
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One image of a snapshot task (`SnapshotByTimeOffsetTaskOutput`, "Event overview").

    Args:
        time_offset_ms: Its place in the video.
        url: Where it lies; empty where it failed.
        err_code: 0 for success.
    """

    time_offset_ms: int | None
    url: str
    err_code: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotsTaken:
    """A `CreateSnapshotByTimeOffsetComplete` event: what was asked for and what came of it.

    Args:
        task_id: Tencent's id of the task.
        file_id: Tencent's id of the video.
        definition: Id of the snapshot template.
        snapshots: The images, the failed ones among them.
    """

    task_id: str
    file_id: str
    definition: int | None
    snapshots: tuple[Snapshot, ...]

    @property
    def failed(self) -> tuple[Snapshot, ...]:
        """The images that could not be taken."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.err_code not in _SUCCESS)


class UnreadableError(ValueError):
    """The text is no answer of VOD; says why."""


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise UnreadableError(f"the number {text[:40]} is beyond what JSON readers hold")
    return number


def _not_json(literal: str) -> Any:
    raise UnreadableError(f"{literal} is not JSON")


# strict=False: documented samples hold raw tabs inside strings. Python's integers keep every digit.
_decoder = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_not_json)
_exact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
_exact_ascii = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), check_circular=False)
_canonical = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), sort_keys=True, check_circular=False)


def decode_json(text: str) -> Any:
    """Read JSON as VOD writes it.

    How deep it may be nested depends on the version of Python (990 levels at least); what is to be the same with all of
    them asks `check_depth`, as `encode_json` does.

    Args:
        text: The whole document.

    Raises:
        UnreadableError: It is not JSON, nested too deeply, holds a number that no double can hold, or so many values
            that they would fill the memory.
    """
    if len(text) > _VALUES_MAX and sum(map(text.count, "[{:,")) > _VALUES_MAX:
        raise UnreadableError(f"it holds more than {_VALUES_MAX:,} values")
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except ValueError as error:
        raise UnreadableError(str(error)) from error


def check_depth(value: Any) -> None:
    """Look at a parsed value.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    level = _containers([value])
    for _ in range(DEPTH_MAX):
        if not level:
            return
        level = [inner for outer in level for inner in _containers(outer)]
    if level:
        raise UnreadableError(_TOO_DEEP)


def _containers(value: Any) -> list[Any]:
    inside = value.values() if isinstance(value, dict) else value
    return [inner for inner in inside if isinstance(inner, dict | list)]


def encode_json(value: Any) -> bytes:
    """Write JSON-equal UTF-8: integers digit for digit, members in their order.

    orjson writes the common case; what it refuses (integers beyond 64 bits, lone surrogates, more than 254 levels) goes
    the exact way.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    try:
        return orjson.dumps(value)
    except TypeError:
        check_depth(value)
        try:
            return _exact.encode(value).encode()
        except UnicodeEncodeError:
            return _exact_ascii.encode(value).encode()


def event_key(content: Mapping[str, Any], sub_app_id: int | None) -> bytes:
    """The content key of an event: SHA-256 over SubAppId and canonical body.

    Members that are null at the top level do not count, since VOD leaves them out or sends them as it likes; nor does
    the order of members.

    Args:
        content: The event without its handle.
        sub_app_id: None and 0 are the same: the account's primary application.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    meaningful = {name: value for name, value in content.items() if value is not None}
    try:
        canonical = orjson.dumps(meaningful, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        check_depth(meaningful)
        canonical = _canonical.encode(meaningful).encode()
    return hashlib.sha256(b"%d\n%b" % (sub_app_id or 0, canonical)).digest()


def make_event(content: Mapping[str, Any], *, source: str, sub_app_id: int | None) -> Event:
    """The event of a body that has no handle.

    Args:
        content: The parsed body of a normal callback.
        source: Name of the source.
        sub_app_id: Its SubAppId.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    event_type = content.get("EventType")
    return Event(
        source=source,
        sub_app_id=sub_app_id,
        type=event_type if isinstance(event_type, str) else "",
        key=event_key(content, sub_app_id),
        body=encode_json(content),
        content=content,
    )


def restore_event(*, body: bytes, key: bytes, event_type: str, source: str, sub_app_id: int | None) -> Event:
    """The event that was stored; a body that never could be read has no content.

    Args:
        body: As it was stored.
        key: As it was stored.
        event_type: As it was stored.
        source: Name of the source that pulled it.
        sub_app_id: Its SubAppId.
    """
    try:
        content = decode_json(body.decode())
        check_depth(content)
    except ValueError:
        content = None
    return Event(
        source=source,
        sub_app_id=sub_app_id,
        type=event_type,
        key=key,
        body=body,
        content=content if isinstance(content, dict) else {},
    )


def read_event(item: Any, *, source: str, sub_app_id: int | None) -> PulledEvent | Malformed:
    """Take one parsed element of `EventSet` apart.

    Args:
        item: The element; whatever has a handle is an event.
        source: Name of the source that pulled it.
        sub_app_id: Its SubAppId.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    handle = _handle_of(item)
    if handle is None:
        piece = encode_json(item).decode()
        why = "it has no usable EventHandle"
        return make_malformed(piece, why=why, has_handle=False, source=source, sub_app_id=sub_app_id)
    content = {name: value for name, value in item.items() if name != "EventHandle"}
    return PulledEvent(handle=handle, event=make_event(content, source=source, sub_app_id=sub_app_id))


def _handle_of(item: Any) -> str | None:
    handle = item.get("EventHandle") if isinstance(item, dict) else None
    if isinstance(handle, int) and not isinstance(handle, bool):  # handles of digits only exist
        handle = str(handle)
    return handle if isinstance(handle, str) and _is_usable(handle) else None


def _is_usable(handle: str | None) -> bool:
    return handle is not None and 0 < len(handle) <= _HANDLE_MAX_CHARS


# --- what cannot be read ----------------------------------------------------------------------------------------------

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_HANDLE = re.compile(rf'"EventHandle"\s*+:\s*+({_STRING}|[0-9]++)')
_TYPE = re.compile(rf'"EventType"\s*+:\s*+({_STRING})')


def make_malformed(piece: str, *, why: str, has_handle: bool, source: str, sub_app_id: int | None) -> Malformed:
    """What becomes of a text that came in an event's place and cannot be read.

    Args:
        piece: The text. Bytes that are not UTF-8 are surrogate escapes.
        why: What is wrong, for a person.
        has_handle: Whether the first handle in the text may confirm it.
        source: Name of the source that pulled it.
        sub_app_id: Its SubAppId.
    """
    # The handle differs at each redelivery: the identity is that of the text without it.
    without_handle = _HANDLE.sub('"EventHandle":""', piece).encode(errors="surrogateescape")
    handle = _first_json(_HANDLE, piece) if has_handle else None
    event = Event(
        source=source,
        sub_app_id=sub_app_id,
        type=_first_json(_TYPE, piece) or "",
        key=hashlib.sha256(b"%d\nmalformed\n%b" % (sub_app_id or 0, without_handle)).digest(),
        body=piece.encode(errors="surrogateescape"),
        content={},
    )
    return Malformed(handle=handle if _is_usable(handle) else None, event=event, why=why)


def _first_json(pattern: re.Pattern[str], text: str) -> str | None:
    """The string or number that the pattern's group holds, None where the text has none."""
    found = pattern.search(text)
    if found is None:
        return None
    try:
        return str(_decoder.decode(found[1]))
    except ValueError:
        return None


# --- what the log, the demo and the sinks want to know of an event ----------------------------------------------------


def payload_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The member that holds the payload. Its name does not follow from the type, so it is the first object found."""
    for value in content.values():
        if isinstance(value, dict):
            return value
    return {}


def _id_in(payload: Mapping[str, Any], content: Mapping[str, Any], name: str) -> str:
    """A string or integer member called `name`: of the payload, else of an object in it, else of the event."""
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
    """Tencent's id of the task that ended, empty where the event names none."""
    return _id_in(payload_of(event.content), event.content, "TaskId")


def file_id_of(event: Event) -> str:
    """Tencent's id of the video, every digit of it, empty where the event names none."""
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
    """Whether the event is of snapshots some of which could not be taken."""
    payload = event.content.get("SnapshotByTimeOffsetCompleteEvent")
    images = payload.get("SnapshotInfoSet") if isinstance(payload, dict) else None
    return isinstance(images, list) and any(
        isinstance(image, dict) and image.get("ErrCode", 0) not in _SUCCESS for image in images
    )


def snapshots_of(event: Event) -> SnapshotsTaken | None:
    """The typed content of a snapshot event, None for any other.

    Fields that are missing or of another type than documented are empty or None: the event is delivered all the same.
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
