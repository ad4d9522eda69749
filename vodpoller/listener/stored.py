"""The part of the page that shows stored events: the filter, the events that match it, and the commands for them."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from vodpoller.clock import timestamp
from vodpoller.errors import JournalError
from vodpoller.journal.operator import REASONS, Filter, Letters, StoredEvent, time_since
from vodpoller.listener.view import View
from vodpoller.logs import printable

ROWS: Final = 25
BODY_CHARS: Final = 8000
SEARCH_SECS: Final = 2.0
# The options of `vodpoller deadletters`, by the fields of the form.
OPTIONS: Final[Mapping[str, str]] = {
    "sink": "--sink",
    "type": "--type",
    "reason": "--reason",
    "since": "--since",
    "file_id": "--file-id",
    "task_id": "--task-id",
}
_VALUE_CHARS: Final = 200


def stored_events(view: View, query: Mapping[str, str]) -> Mapping[str, Any]:
    """The stored events that the page shows, as values for the template.

    Args:
        view: The process and the daemon.
        query: The fields of the form.
    """
    conditions = {name: query.get(name, "").strip()[:_VALUE_CHARS] for name in OPTIONS}
    state = "pending" if query.get("pending") else "dead"
    shown: dict[str, Any] = {
        "conditions": conditions,
        "state": state,
        "reasons": REASONS[state],
        "rows": [],
        "problem": "",
    }
    try:
        wanted = _filter_of(conditions, state)
        with Letters(view.journal_path) as letters:
            rows, is_all = _found(letters, wanted)
    except (ValueError, JournalError) as error:
        return shown | {"problem": str(error), "is_all": True, "commands": ()}
    shows_bodies = view.access.password is not None
    return shown | {
        "rows": [_row(event, body if shows_bodies else None) for event, body in rows],
        "is_all": is_all,
        "commands": _commands(conditions, state) if rows else (),
    }


def _filter_of(conditions: Mapping[str, str], state: str) -> Filter:
    for name, text in conditions.items():
        if printable(text) != text:
            raise ValueError(f"{name} has characters that cannot be printed")
    reason = conditions["reason"] or None
    if reason is not None and reason not in REASONS[state]:
        raise ValueError(f"{state} events never have the reason {reason!r}")
    return Filter(
        state=state,
        sink=conditions["sink"] or None,
        event_type=conditions["type"] or None,
        reason=reason,
        since=time_since(conditions["since"], time.time()) if conditions["since"] else None,
        file_id=conditions["file_id"] or None,
        task_id=conditions["task_id"] or None,
    )


def _found(letters: Letters, wanted: Filter) -> tuple[list[tuple[StoredEvent, bytes]], bool]:
    """The first events that match, and whether these are all. The search ends after `SEARCH_SECS`."""
    ends_at = time.monotonic() + SEARCH_SECS
    found: list[tuple[StoredEvent, bytes]] = []
    # The ids, which only bodies hold, are compared here, so that a search without a match also ends in time.
    for event, body in letters.with_bodies(replace(wanted, file_id=None, task_id=None)):
        if wanted.takes(event.file_id, event.task_id):
            if len(found) == ROWS:
                return found, False
            found.append((event, body))
        if time.monotonic() > ends_at:
            return found, False
    return found, True


def _row(event: StoredEvent, body: bytes | None) -> Mapping[str, Any]:
    own = f"vodpoller deadletters replay {'--pending ' if event.state == 'pending' else ''}{event.id}"
    return {
        "id": event.id,
        "sink": event.sink or "(none)",
        "reason": event.reason,
        "error": event.error,
        "attempts": event.attempts,
        "stored_at": timestamp(event.stored_at),
        "due_at": None if event.due_at is None else timestamp(event.due_at),
        "source": event.source,
        "event_type": event.event_type,
        "file_id": event.file_id,
        "task_id": event.task_id,
        "size_bytes": event.size_bytes,
        "body": None if body is None else body[: 4 * BODY_CHARS].decode(errors="replace")[:BODY_CHARS],
        "is_cut": body is not None and len(body.decode(errors="replace")) > BODY_CHARS,
        "command": own,
    }


def _commands(conditions: Mapping[str, str], state: str) -> Sequence[str]:
    options = [f"{OPTIONS[name]} {shlex.quote(text)}" for name, text in conditions.items() if text]
    tail = " ".join((*(("--pending",) if state == "pending" else ()), *options))
    return [f"vodpoller deadletters {verb} {tail}".rstrip() for verb in ("replay", "purge")]
