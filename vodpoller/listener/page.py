"""The status page: one page without scripts, rendered for each request.

The template engine escapes every text that comes from an event, a receiver or VOD. Such a text is also cut to a maximum
length, its invisible characters are made visible, and its writing direction cannot affect the text around it.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from vodpoller.clock import timestamp
from vodpoller.listener.stored import stored_events
from vodpoller.listener.view import View
from vodpoller.logs import printable
from vodpoller.telemetry import Count, Duration, Gauge, Numbers

REFRESH_SECS: Final = 10
TEXT_CHARS: Final = 300
_STYLE: Final = (files(__package__) / "page.css").read_text(encoding="utf-8")
STYLE_HASH: Final = "sha256-" + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
"""The hash by which the Content-Security-Policy permits the page's own style and no other."""

_SIZES: Final = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def page(view: View, query: Mapping[str, str]) -> bytes:
    """The whole page.

    Args:
        view: The process and the daemon.
        query: The fields of the form, and `refresh`: "off" for a page that does not refresh itself.
    """
    report = view.report()
    lately = view.telemetry.lately()
    stored = report["stored"]
    shown = {
        "report": report,
        "sources": [_source(view, lately, it) for it in report["sources"]],
        "sinks": [_sink(lately, it, stored) for it in report["sinks"]],
        "removed": _removed(report),
        "totals": {state: sum(it["events"] for it in stored if it["state"] == state) for state in ("pending", "dead")},
        "events": [{"at": timestamp(at), **fields} for at, fields in view.telemetry.recent()],
        "letters": stored_events(view, query),
        "refresh_secs": 0 if query.get("refresh") == "off" else REFRESH_SECS,
        "has_password": view.access.password is not None,
    }
    text = _TEMPLATE.render(style=_STYLE, **view.cleared(shown))
    return text.encode(errors="replace")


def _source(view: View, lately: Numbers, source: Mapping[str, Any]) -> Mapping[str, Any]:
    waiting = view.telemetry.gauge(Gauge.QUEUE_EVENTS).get((("source", source["name"]),))
    return {
        **source,
        "per_sec": lately.per_sec(Count.EVENTS_SETTLED, source=source["name"]),
        "waiting": waiting,
    }


def _sink(lately: Numbers, sink: Mapping[str, Any], stored: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    labels = (("sink", sink["name"]),)
    calls = lately.durations.get((Duration.SINK_DELIVERY, labels))
    own = {it["state"]: it for it in stored if it["sink"] == sink["name"]}
    return {
        **sink,
        "per_sec": lately.per_sec(Count.SINK_ATTEMPTS, sink=sink["name"], result="accepted"),
        "p95_secs": calls.quantile_secs(0.95) if calls else None,
        "pending": own.get("pending"),
        "dead": own.get("dead"),
    }


def _removed(report: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The stored events of sinks that the configuration does not have, and those without a sink."""
    names = {sink["name"] for sink in report["sinks"]}
    return [it for it in report["stored"] if it["sink"] not in names]


# --- filters of the template ------------------------------------------------------------------------------------------


def _shown(value: object, chars: int = TEXT_CHARS) -> Markup:
    """A text from outside: cut, with every character visible, and with an isolated writing direction."""
    text = str(value)
    cut = printable(text[:chars]) + ("…" if len(text) > chars else "")
    return Markup("<bdi>{}</bdi>").format(cut)


def _with_code(value: str) -> Markup:
    """A text in which commands in backticks are marked as code."""
    parts = re.split(r"`([^`]*)`", printable(value[: 4 * TEXT_CHARS]))
    marked = [Markup("<code>{}</code>").format(part) if at % 2 else escape(part) for at, part in enumerate(parts)]
    return Markup("<bdi>{}</bdi>").format(Markup().join(marked))


def _per_sec(value: float) -> str:
    if not value:
        return "0 /s"
    return f"{value:,.1f} /s" if value >= 1 else f"{60 * value:,.1f} /min"


def _secs(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:,.0f} ms" if value < 1 else f"{value:,.1f} s"


def _bytes(value: float) -> str:
    size, unit = next(((size, unit) for size, unit in _SIZES if value >= size), (1, "bytes"))
    return f"{value / size:,.1f} {unit}" if size > 1 else f"{value:,.0f} bytes"


def _ago(at: str | None) -> str:
    """The time that has passed since a time in ISO 8601, as text."""
    if not at:
        return "never"
    secs = (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    for unit_secs, unit in _UNITS:
        if secs >= 2 * unit_secs or unit_secs == 1:
            return f"{max(secs, 0) / unit_secs:,.0f} {unit} ago"
    raise AssertionError("the last unit is always returned")


_ENVIRONMENT: Final = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {
    "shown": _shown,
    "with_code": _with_code,
    "per_sec": _per_sec,
    "secs": _secs,
    "bytes": _bytes,
    "ago": _ago,
}
_TEMPLATE: Final = _ENVIRONMENT.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
