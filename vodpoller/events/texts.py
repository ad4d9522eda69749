"""Events in a text from the operator: an answer to `PullEvents`, a list, one event, or one event per line.

Each event is read in the same way as a pulled event.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vodpoller.events.codec import UnreadableError, decode_json
from vodpoller.events.event import Event, Malformed, make_event, read_event

_HANDLE: Final = "EventHandle"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEvent:
    """One event of the text, or a part of the text that cannot be read as an event.

    Args:
        place: The place in the text, for messages: "line 3", "event 2"; empty for the whole text.
        event: The event; None if it cannot be read.
        why: Why it cannot be read; empty if it can be read.
    """

    place: str
    event: Event | None = None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    place: str
    value: Any = None
    why: str = ""
    needs_handle: bool = False


def events_in(text: str, *, source: str, sub_app_id: int | None) -> Iterator[FoundEvent]:
    """Read all events of a text; an event that cannot be read does not affect the others.

    Args:
        text: Any text. An answer may have the form in which VOD sends it, or in which SDKs and tccli print it; if it
            holds no event, nothing is returned.
        source: Name of the source from which the events are assumed to be.
        sub_app_id: The SubAppId of the source.
    """
    for item in _items_in(text):
        try:
            found = _read(item, source=source, sub_app_id=sub_app_id)
        except UnreadableError as error:
            yield FoundEvent(place=item.place, why=str(error))
        else:
            yield FoundEvent(place=item.place, event=found)


def _read(item: _Item, *, source: str, sub_app_id: int | None) -> Event:
    if item.why:
        raise UnreadableError(item.why)
    if not isinstance(item.value, dict):
        raise UnreadableError("an event is a JSON object, and this is another value")
    if not item.needs_handle and _HANDLE not in item.value:
        return make_event(item.value, source=source, sub_app_id=sub_app_id)
    found = read_event(item.value, source=source, sub_app_id=sub_app_id)
    if isinstance(found, Malformed):
        raise UnreadableError(found.why)
    return found.event


def _items_in(text: str) -> Sequence[_Item]:
    try:
        value = decode_json(text)
    except UnreadableError as error:
        lines = _lines_in(text)
        # If no line is an event, the whole text is one invalid event.
        return lines if any(isinstance(line.value, dict) for line in lines) else [_Item(place="", why=str(error))]
    is_answer, elements = _answer_in(value)
    if is_answer or isinstance(value, list):
        items = elements if is_answer else value
        return [_Item(place=f"event {at}", value=item, needs_handle=is_answer) for at, item in enumerate(items, 1)]
    return [_Item(place="", value=value)]


def _answer_in(value: Any) -> tuple[bool, Sequence[Any]]:
    """Whether a value is an answer, and the elements of its `EventSet`."""
    inner = value.get("Response", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or (inner is value and "EventSet" not in value):
        return False, ()
    elements = inner.get("EventSet")
    return True, elements if isinstance(elements, list) else ()


def _lines_in(text: str) -> Sequence[_Item]:
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_Item(place=f"line {number}", value=decode_json(line)))
        except UnreadableError as error:
            items.append(_Item(place=f"line {number}", why=str(error)))
    return items
