"""The event, its lease, its key, and how it is read from an answer.

Facts are from Tencent Cloud's API documents "PullEvents" (product/266/34183) and "Event overview" (266/33948), and from
their samples, which show every irregularity that is handled here.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vodpoller.events.codec import DEPTH_MAX, canonical_json, check_depth, decode_json, encode_json

_HANDLE_MAX_CHARS = 64 * 1024  # a longer one could not be confirmed in one call with fifteen others


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The time in which the handles of one pull can be confirmed. It cannot be extended.

    Args:
        starts_at: Monotonic time, in seconds, at which the pull was sent: the earliest time at which VOD can have
            started the lease.
        secs: The length of the lease; 30 at VOD.
    """

    starts_at: float
    secs: float

    @property
    def ends_at(self) -> float:
        """Monotonic time, in seconds, from which VOD may send the events in the answer to another pull."""
        return self.starts_at + self.secs


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One `EventContent`, without its handle, which belongs to a pull and not to the event.

    Args:
        source: The name of the source that pulled it.
        sub_app_id: Tencent's SubAppId; None for an account without.
        type: `EventType` as it was received, an open set; empty if the event has none.
        key: The identity, the same at every redelivery and after a restart: the content key, SHA-256 over SubAppId and
            canonical body; if the content has no id of its own, the key of the occurrence (see
            `vodpoller.events.identity`).
        body: UTF-8 JSON, the same as the body of a v3.0 normal callback.
        content: The parsed body. It must not be changed.
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
    """An element of an answer that cannot be read as an event.

    Args:
        handle: The handle that confirms it; None if no handle is usable, so that it cannot be confirmed.
        event: The received text, as an event without content, to be stored as a dead letter.
        why: What is wrong, for messages.
    """

    handle: str | None
    event: Event
    why: str


def event_key(content: Mapping[str, Any], sub_app_id: int | None) -> bytes:
    """The content key of an event: SHA-256 over SubAppId and canonical body.

    It depends neither on the order of members, nor on members at the top level that are null, since VOD sometimes sends
    these and sometimes leaves them out.

    Args:
        content: The event without its handle.
        sub_app_id: None and 0 are the same: the account's primary application.

    Raises:
        UnreadableError: It is nested more than `DEPTH_MAX` levels deep.
    """
    meaningful = {name: value for name, value in content.items() if value is not None}
    return hashlib.sha256(b"%d\n%b" % (sub_app_id or 0, canonical_json(meaningful))).digest()


def make_event(content: Mapping[str, Any], *, source: str, sub_app_id: int | None) -> Event:
    """Make the event of a body that has no handle.

    Args:
        content: The parsed body of a normal callback.
        source: Name of the source.
        sub_app_id: The SubAppId of the source.

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
    """Make the event of a stored event's row. If its body cannot be read, its content is empty.

    Args:
        body: The stored body.
        key: The stored key.
        event_type: The stored event type.
        source: Name of the source that pulled it.
        sub_app_id: The SubAppId of the source.
    """
    try:
        content = decode_json(body.decode())
        if body.count(b"[") + body.count(b"{") > DEPTH_MAX:  # only then can it be nested too deeply
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
    """Convert one parsed element of `EventSet`.

    Args:
        item: The element.
        source: Name of the source that pulled it.
        sub_app_id: The SubAppId of the source.

    Returns:
        The event; `Malformed` if the element has no usable handle.

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
    if isinstance(handle, int) and not isinstance(handle, bool):  # some handles consist of digits only
        handle = str(handle)
    return handle if isinstance(handle, str) and _is_usable(handle) else None


def _is_usable(handle: str | None) -> bool:
    return handle is not None and 0 < len(handle) <= _HANDLE_MAX_CHARS


# --- elements that cannot be read -------------------------------------------------------------------------------------

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_HANDLE = re.compile(rf'"EventHandle"\s*+:\s*+({_STRING}|[0-9]++)')
_TYPE = re.compile(rf'"EventType"\s*+:\s*+({_STRING})')


def make_malformed(piece: str, *, why: str, has_handle: bool, source: str, sub_app_id: int | None) -> Malformed:
    """Convert the text of an element that cannot be read as an event.

    Args:
        piece: The text. Bytes that are not UTF-8 are surrogate escapes.
        why: What is wrong, for messages.
        has_handle: Whether the first handle in the text may confirm it.
        source: Name of the source that pulled it.
        sub_app_id: The SubAppId of the source.
    """
    # The handle differs at each redelivery, so the key is made from the text without it.
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
    """The string or number in the pattern's group; None if the text has none."""
    found = pattern.search(text)
    if found is None:
        return None
    try:
        return str(decode_json(found[1]))
    except ValueError:
        return None
