"""Structured logs on stderr: one object per line, in the same form for our lines, libraries' lines and warnings.

`CATALOGUE` lists all names that the field `event` of a line can have.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, Final, Literal, Protocol, TextIO

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from vodpoller.outlet import Outlet

Level = Literal["debug", "info", "warning", "error"]
Logger = FilteringBoundLogger

LINE_MAX_BYTES: Final = 16 * 1024
# Ordinary words contain shorter secrets: hiding these would make lines unreadable, and the gaps would reveal them.
SEARCHED_MIN_CHARACTERS: Final = 8
PATIENCE_SECS: Final = 1.0
_INTEGER_BITS: Final = 64  # most JSON parsers can read integers of this size
REMEMBERED_CAUSES: Final = 1000
REMEMBERED_CHARS: Final = 500  # of each
_OF_SEVERAL_LINES: Final = frozenset({"exception", "stack"})
# This field makes several lines of one entry: each of its mappings has the fields of one line; the entry's other fields
# are in every line.
EACH: Final = "each"

CATALOGUE: Final[Mapping[str, str]] = {
    "api.answered": "a call to VOD ended (debug)",
    "answer.salvaged": "an answer of VOD was not readable as a whole; what could be read of it is used",
    "breaker.closed": "a sink accepts events again",
    "breaker.opened": "a sink failed on several events in a row; its events wait in the journal until a probe succeeds",
    "callback.expired": "the signature of a callback is valid, but it has expired; the callback is processed anyway",
    "callback.failed": "an unexpected error occurred in a callback, so it is not answered; VOD tries it again",
    "callback.refused": "a request was refused, since it is not a callback of VOD; one line per cause and 5 minutes",
    "clock.corrected": "this machine's clock is wrong; requests are signed with VOD's time instead",
    "clock.stepped": "the wall clock jumped; schedules and due times were moved by the same step",
    "config.warning": "the configuration can be used, but something in it is probably not intended",
    "confirm.failed": "some handles could not be confirmed within their lease; VOD brings the events again",
    "confirm.refused": "VOD refuses handles although their lease is far from its end: is the SubAppId right?",
    "credentials.expiring": "the temporary key expires soon, and no new one can be obtained: pulls will stop",
    "credentials.failed": "no new temporary key was obtained; the present one stays in use until it expires",
    "credentials.refreshed": "a new temporary key is in use",
    "daemon.reloaded": "files were reopened, secrets read again, back-offs ended; a changed configuration was taken",
    "daemon.started": "configuration, journal and sinks are open and events are being pulled",
    "daemon.stopped": "everything that was pulled is settled; the process ends",
    "daemon.stopping": "a signal asked the daemon to stop; no new pull starts",
    "database.nondurable": "a database's settings may lose what it has committed, if power is lost",
    "delivery.failed": "an attempt at a sink failed and will be repeated",
    "event.dead": "an event at a sink became a dead letter: a person must look at it",
    "event.left": "events that no route covers are left with VOD and come again every lease",
    "event.malformed": "an event cannot be read: it becomes a dead letter if it has a handle, else only this line",
    "event.settled": "the fate of one pulled event",
    "file.changed": "another process wrote to a sink's file, or emptied it; what it wrote is kept",
    "file.recovered": "lines that the ledger lacked after a crash were entered in it; an incomplete last line was cut",
    "file.rotated": "a sink renamed its file, whose day or hour was over, and goes on in a new one",
    "file.unrotated": "a sink's file could not be renamed although its day or hour is over; its lines go on in it",
    "image.skipped": "an image is not saved: VOD has none, or a file of this name exists and may be another event's",
    "inbox.unpruned": "old rows of a sink's inbox could not be deleted; it is tried again",
    "journal.failed": "the journal cannot be written; events stay with VOD and pulling waits",
    "journal.migrated": "the journal of an earlier version was converted to this one's format; a copy of it is kept",
    "journal.recovered": "the journal can be written again",
    "journal.pruned": "old ledger rows were deleted (debug)",
    "listener.failed": "the listener cannot listen; it tries again, and events are delivered as before",
    "listener.started": "metrics, probes and the status page are served",
    "log.dropped": "the log was not read for a while: this number of lines was dropped instead of blocking the daemon",
    "library.logged": "a log line or a warning of a library",
    "pending.delivered": "a stored event was delivered",
    "pending.stuck": "stored events wait for a sink that the configuration no longer has: a person must decide",
    "pull.failed": "pulling failed and will be repeated after a back-off",
    "pull.recovered": "pulling works again",
    "puller.failed": "an unexpected error occurred in a thread that pulls; VOD brings its events again",
    "recovery.progress": "a long file is being read, to find lines that were written but not entered before a crash",
    "reload.failed": "the changed configuration cannot be used, for the reason in the line; the former one runs on",
    "secret.unreadable": "a secret's file could not be read again; the last value stays in use",
    "simulator.answered": "the simulator answered a request to its API (debug)",
    "sink.stuck": "a call of a sink has not returned long after its deadline",
    "status.unavailable": "the socket of `vodpoller status` cannot be created; everything else works",
    "task.failed": "a periodic task failed; it runs again at its next time",
    "thread.overdue": "a thread is far past its deadline; the watchdog is no longer fed",
    "wal.grown": "the journal's WAL cannot be cut, because another process reads the journal without a pause",
    "worker.failed": "an unexpected error occurred in a thread of a sink; the events that it held are tried again",
}

# Characters that move a terminal's cursor, set its title or clipboard, or reverse or hide text: C0 except tab and line
# feed, DEL, C1, bidirectional controls, separators, invisible characters; and lone surrogates, which cannot be encoded.
# The two joiners stay (U+200C, U+200D): scripts and emoji need them.
_NOT_PRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

_PRIORITY: Final = {"debug": b"<7>", "info": b"<6>", "warning": b"<4>", "error": b"<3>", "critical": b"<2>"}


def printable(text: str) -> str:
    """The text in a form that is safe on a terminal, whatever its origin: no character of it has an effect.

    What is not printable becomes an escape in JSON's form (that of ESC is u001b behind a backslash), so that a JSON
    document still means the same. Line feeds and tabs stay as they are.

    Args:
        text: Any text, also with lone surrogates (a path with bytes that are not UTF-8).
    """
    return _NOT_PRINTABLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


class _Stream(Protocol):
    def fileno(self) -> int: ...


class LineLogger:
    """Writes rendered lines to a file descriptor, each of them whole, from any thread, and waits for a reader once.

    If the pipe is full, a line waits for `PATIENCE_SECS` at most. From then on lines are dropped at once, until a
    separate thread has written the rest of the line that was begun and the number of dropped lines. After any other
    failure (the reader is gone, the disk is full), the same bytes are tried again with the next line.

    Args:
        stream: Destination of the lines. Its descriptor is written to directly; if it has none (a captured stderr),
            `stream.write` is used.

    Attributes:
        dropped_lines: Number of lines that were dropped so far.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._render_dropped: Callable[[int], bytes] = lambda _dropped_lines: b""
        try:
            self._outlet: Outlet | None = Outlet(stream.fileno())
        except (OSError, ValueError):
            self._outlet = None
        self._lock = threading.Lock()
        self._owed = b""  # the rest of what was begun: nothing else may be written before it
        self._dropped_lines = 0  # those that no line has reported yet
        self.dropped_lines = 0
        self._is_stuck = False

    def report_dropped(self, render: Callable[[int], bytes]) -> None:
        """Report from now on the number of dropped lines, as soon as there is room again.

        Args:
            render: Renders the line that reports this number.
        """
        self._render_dropped = render

    def msg(self, *lines: bytes) -> None:
        """Write the lines in one write, or drop them. A reader that is slow or gone never stops the daemon."""
        with self._lock:
            if self._outlet is None:
                with suppress(OSError, ValueError):
                    self._stream.write(b"".join(lines).decode(errors="replace"))
                return
            if self._is_stuck or not self._catch_up(self._outlet):
                self._dropped_lines += len(lines)
                self.dropped_lines += len(lines)
                return
            self._owed += b"".join(lines)
            if not self._flush(self._outlet, PATIENCE_SECS):
                self._watch(self._outlet)

    debug = info = warning = error = critical = msg

    def _catch_up(self, outlet: Outlet) -> bool:
        """Write what an earlier failure left. Returns whether something new may be written now."""
        if self._owed:
            self._flush(outlet, 0)
        if self._owed:
            return False
        if self._dropped_lines:
            self._owed, self._dropped_lines = self._render_dropped(self._dropped_lines), 0
        return True

    def _flush(self, outlet: Outlet, within_secs: float) -> bool:
        """Write what is owed. Returns False if the pipe is full; after another failure it stays owed."""
        ends_at = time.monotonic() + within_secs
        with suppress(OSError):
            while self._owed:
                left_secs = ends_at - time.monotonic()
                written = outlet.write_some(self._owed, left_secs)
                self._owed = self._owed[written:]
                if not written and left_secs <= 0:
                    return False
        return True

    def _watch(self, outlet: Outlet) -> None:
        self._is_stuck = True
        try:
            threading.Thread(target=self._await_room, args=(outlet,), name="log-pipe", daemon=True).start()
        except RuntimeError:  # the system allows no more threads: the next line waits, too
            self._is_stuck = False

    def _await_room(self, outlet: Outlet) -> None:
        while self._is_stuck:
            outlet.await_room()
            with self._lock:
                if self._flush(outlet, 0) and self._catch_up(outlet) and self._flush(outlet, 0):
                    self._is_stuck = False


def searched_for(secrets: Iterable[str]) -> list[str]:
    """The secrets that are long enough to be replaced in texts, in the order that `cleared` needs."""
    return sorted({it for it in secrets if len(it) >= SEARCHED_MIN_CHARACTERS}, key=len, reverse=True)


def cleared(value: Any, searched: Sequence[str]) -> Any:
    """The value with each secret in its texts replaced. Names in mappings are our own, so they stay unchanged.

    Args:
        value: A JSON value; anything else is searched as `str(value)`.
        searched: The result of `searched_for`: longer secrets first, since one may be a part of another.
    """
    match value:
        case None | bool():
            return value
        case str():
            for secret in searched:
                value = value.replace(secret, "[secret]")
            return value
        case Mapping():
            return {name: cleared(inner, searched) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [cleared(inner, searched) for inner in value]
        case _:
            text = str(value)
            return cleared(text, searched) if any(secret in text for secret in searched) else value


class _Renderer:
    """Renders an entry as one line, or as several if it has `EACH`, without secrets.

    Args:
        priorities: Whether lines begin with sd-daemon's `<priority>`.
        secrets: Returns the secrets to replace; called for each entry, since secrets may be read again.
    """

    def __init__(self, *, priorities: bool, secrets: Callable[[], Iterable[str]]) -> None:
        self._priorities = priorities
        self._secrets = secrets
        self._known: list[str] = []
        self._searched: list[str] = []
        self._forms: tuple[bytes, ...] = ()

    def __call__(self, _logger: WrappedLogger, _name: str, event_dict: EventDict) -> tuple[Sequence[bytes], EventDict]:
        """Structlog's last processor: returns the arguments of `LineLogger.msg`."""
        prefix = _PRIORITY.get(event_dict["level"], b"<6>") if self._priorities else b""
        # The fields that every line has come first: they are easier to find for an operator who tails the log.
        head = {name: event_dict.pop(name) for name in ("timestamp", "level", "event")}
        known = list(self._secrets())
        if known != self._known:
            self._searched = searched_for(known)
            self._forms = tuple(form for secret in self._searched for form in _forms_of(secret))
            self._known = known
        each = event_dict.pop(EACH, ({},))
        fields = [{**event_dict, **its_own} for its_own in each]
        return [prefix + line + b"\n" for line in self._lines(head, fields)], {}

    def _lines(self, head: dict[str, Any], each: Sequence[dict[str, Any]]) -> Iterable[bytes]:
        raise NotImplementedError


class _Json(_Renderer):
    def _lines(self, head: dict[str, Any], each: Sequence[dict[str, Any]]) -> Iterable[bytes]:
        lines = [_encode({**head, **fields}) for fields in each]
        together = b"".join(lines)  # searching them one by one takes as long as all the other work
        if any(form in together for form in self._forms):
            # Secrets are replaced before lines are cut, since a cut may leave half of a secret.
            lines = [_encode({**head, **cleared(fields, self._searched)}) for fields in each]
        return (line if len(line) <= LINE_MAX_BYTES - 8 else _shortened(line) for line in lines)


class _Console(_Renderer):
    def __init__(self, *, priorities: bool, secrets: Callable[[], Iterable[str]], colors: bool) -> None:
        super().__init__(priorities=priorities, secrets=secrets)
        # The traceback is already text here. A traceback that structlog makes would show the values of variables.
        self._render = structlog.dev.ConsoleRenderer(
            colors=colors, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
        )

    def _lines(self, head: dict[str, Any], each: Sequence[dict[str, Any]]) -> Iterable[bytes]:
        return (self._line(head, fields) for fields in each)

    def _line(self, head: dict[str, Any], fields: dict[str, Any]) -> bytes:
        shown = {name: _shown(name, value) for name, value in cleared(fields, self._searched).items()}
        line: str = self._render(None, head["level"], head | shown)
        return line.encode(errors="backslashreplace")[: LINE_MAX_BYTES - 8]


def _shown(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    return printable(value) if name in _OF_SEVERAL_LINES else printable(value).replace("\n", "\\n")


def _encode(event_dict: EventDict) -> bytes:
    try:
        line = orjson.dumps(event_dict, default=_jsonable)
    except TypeError:  # lone surrogates, integers beyond 64 bits
        line = orjson.dumps(_safe(dict(event_dict)))
    # JSON does not escape DEL, C1 and bidirectional controls, but lines are read on terminals.
    return line if line.isascii() and b"\x7f" not in line else printable(line.decode()).encode()


def _jsonable(value: object) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def _safe(value: object) -> object:
    """The value, changed only as far as JSON parsers other than Python's could not read it."""
    match value:
        case None | bool() | float():
            return value
        case str():
            return value.encode(errors="backslashreplace").decode()
        case int():
            return value if value.bit_length() < _INTEGER_BITS else str(value)
        case Mapping():
            return {str(_safe(str(name))): _safe(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_safe(inner) for inner in value]
        case _:
            return _safe(_jsonable(value))


def _shortened(line: bytes) -> bytes:
    """The line with its long fields cut so that it fits: otherwise journald or a log shipper would cut it anywhere."""
    fields = orjson.loads(line)
    room = max(LINE_MAX_BYTES // (2 * max(len(fields), 8)), 400)
    short = {name: _cut(value, room) for name, value in fields.items()} | {"truncated": True}
    while len(shortened := _encode(short)) > LINE_MAX_BYTES - 8:
        short = dict(list(short.items())[: len(short) // 2]) | {"truncated": True}
    return shortened


def _cut(value: object, room: int) -> object:
    if isinstance(value, bool | int | float | None):
        return value
    text = value if isinstance(value, str) else _encode({"": value}).decode()
    # An escaped character takes up to six bytes in the line.
    return text if len(text) * 6 <= room else text[: room // 6] + "…"


def _forms_of(secret: str) -> tuple[bytes, bytes]:
    """The secret as it is, and as JSON writes it."""
    return secret.encode(errors="backslashreplace"), _encode({"": secret})[5:-2]


class _FromLibraries(logging.Handler):
    """Writes the log lines of libraries in our form."""

    def __init__(self, log: Logger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            name = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
            write = getattr(self._log, name, self._log.info)
            write("library.logged", logger=record.name, message=_message_of(record), exc_info=record.exc_info or None)
        except Exception:  # noqa: BLE001 - logging must never raise into the library that logs
            self.handleError(record)


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):  # its arguments do not fit its format
        return f"{record.msg} {record.args!r}"


def make_logger(
    stream: TextIO,
    *,
    level: Level = "info",
    log_format: Literal["json", "console"] | None = None,
    secrets: Callable[[], Iterable[str]] = tuple,
    journald_stream: str = "",
    lines: LineLogger | None = None,
) -> Logger:
    """Make the logger of the process, and give the same form to the lines of libraries and to warnings.

    Args:
        stream: Destination of the lines: stderr.
        level: The lowest level that is written.
        log_format: None is "console" on a terminal and "json" elsewhere.
        secrets: Returns what must not be in any value of a line; called for each entry. Secrets of fewer than
            `SEARCHED_MIN_CHARACTERS` characters are not searched for: ordinary words contain them.
        journald_stream: `$JOURNAL_STREAM`. If it names the stream, lines get their `<priority>` (sd-daemon(3)).
        lines: The writer that the stream already has, so that a line that it has begun stays whole; None for a new one.
    """
    chosen = log_format or ("console" if stream.isatty() else "json")
    priorities = is_journald(stream, journald_stream)
    renderer: Any = (
        _Json(priorities=priorities, secrets=secrets)
        if chosen == "json"
        else _Console(priorities=priorities, secrets=secrets, colors=stream.isatty())
    )
    processors = [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        renderer,
    ]

    def render_dropped(dropped_lines: int) -> bytes:
        entry: Any = {"event": "log.dropped", "dropped_lines": dropped_lines}
        for processor in processors:
            entry = processor(None, "warning", entry)
        (line,), _ = entry
        return bytes(line)

    lines = lines or LineLogger(stream)
    lines.report_dropped(render_dropped)
    log: Logger = structlog.wrap_logger(
        lines,
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        cache_logger_on_first_use=True,
    ).bind()
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _FromLibraries):
            root.removeHandler(handler)
    root.addHandler(_FromLibraries(log))
    root.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.captureWarnings(capture=True)
    return log


def is_journald(stream: _Stream, journald_stream: str) -> bool:
    """Whether the stream is the one that systemd connected to journald: `$JOURNAL_STREAM` is its device:inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journald_stream == f"{status.st_dev}:{status.st_ino}"


class RepeatLimiter:
    """Logs a line that repeats once per cause, then only counts it, so that a long fault does not fill the log.

    Args:
        log: Destination of log lines.
        window_secs: After this time the same cause is logged again, with the number of lines that were suppressed.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self, log: Logger, *, window_secs: float = 300.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._window_secs = window_secs
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._logged: dict[str, tuple[float, int]] = {}

    def log_once(self, level: Level, event: str, *, cause: str, **fields: Any) -> bool:
        """Log the line, or count it if its cause was logged within `window_secs`.

        Args:
            level: The level of the line.
            event: A name of the catalogue.
            cause: Lines of the same cause are repetitions; it is not part of the line. Of a long one, only the first
                `REMEMBERED_CHARS` characters and a hash are kept.
            fields: The line's fields.

        Returns:
            Whether a line was written.
        """
        now = self._monotonic()
        if len(cause) > REMEMBERED_CHARS:
            cause = cause[:REMEMBERED_CHARS] + sha256(cause.encode(errors="backslashreplace")).hexdigest()
        with self._lock:
            logged_at, suppressed = self._logged.get(cause, (None, 0))
            if logged_at is not None and now - logged_at < self._window_secs:
                self._logged[cause] = (logged_at, suppressed + 1)
                return False
            if len(self._logged) >= REMEMBERED_CAUSES:  # some causes quote input, so their number has no limit
                self._logged.clear()
            self._logged[cause] = (now, 0)
        if suppressed:
            fields["suppressed_lines"] = suppressed
        getattr(self._log, level)(event, **fields)
        return True

    def reset(self, prefix: str) -> int | None:
        """Forget the causes that start with `prefix`, since they are over: the next line of each is logged.

        Returns:
            Number of lines that were suppressed for them; None if no such cause was logged.
        """
        with self._lock:
            over = [cause for cause in self._logged if cause.startswith(prefix)]
            return sum(self._logged.pop(cause)[1] for cause in over) if over else None
