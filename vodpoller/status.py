"""One frozen snapshot of the daemon's state, from which `STATUS=`, `vodpoller status` and the listener are made.

The daemon makes the snapshot from its parts; all functions here are pure.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vodpoller.clock import timestamp

FIRST_PULL_SECS: Final = 10.0
PULL_SECS: Final = 60.0
RENEWAL_SECS: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PullError:
    """A pull that failed.

    Args:
        at: Time of the failure, in seconds since 1970.
        message: The text of its error.
        error_code: Tencent's code, empty if there is none.
        request_id: Tencent's RequestId, empty if there is none.
    """

    at: float
    message: str
    error_code: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """The state of one source. Times are in seconds since 1970.

    Args:
        name: The source's name.
        last_pull_at: When VOD last answered a pull; None for never.
        pulls_in_flight: Number of pulls that are outstanding.
        failing_since: Time of the first failure since the last success; None while pulling works.
        next_pull_at: When the next pull is sent, if it waits for the end of a back-off.
        error: The error of the last pull; empty while pulling works.
        error_code: Tencent's code of that error, empty if there is none.
        request_id: Tencent's RequestId of that error, empty if there is none.
        remedy: What to do about it.
        last_error: The last pull that failed, also if pulling works again; None if none failed since the start.
        is_pushed: Whether VOD sends the application's events to a URL: then none can be pulled.
        type: "pull", or "callback": then only the name and the following arguments apply.
        last_callback_at: When the last callback was processed; None for never.
        callbacks_in_flight: Number of callbacks that are being processed.
        connections: Number of open connections at its address.
    """

    name: str
    last_pull_at: float | None = None
    pulls_in_flight: int = 0
    failing_since: float | None = None
    next_pull_at: float | None = None
    error: str = ""
    error_code: str = ""
    request_id: str = ""
    remedy: str = ""
    last_error: PullError | None = None
    is_pushed: bool = False
    type: str = "pull"
    last_callback_at: float | None = None
    callbacks_in_flight: int = 0
    connections: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkStatus:
    """The state of one sink. Times are in seconds since 1970.

    Args:
        name: The sink's name.
        down_since: When its breaker opened; None if it is closed.
        paused_until: Until when the receiver asked to wait; None if it did not ask.
        next_try_at: When it is tried next; None if nothing keeps events from it.
        error: The error of its last failed attempt, if it is down or paused.
        queued: Number of deliveries that wait in its queue.
        queue_max_events: Number of deliveries that may wait in it.
        last_success_at: When it last accepted an event; None if it accepted none since the start.
    """

    name: str
    down_since: float | None = None
    paused_until: float | None = None
    next_try_at: float | None = None
    error: str = ""
    queued: int = 0
    queue_max_events: int = 0
    last_success_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStatus:
    """The number of stored events of one sink in one state.

    Args:
        sink: The sink's name; empty if no route named one.
        state: "pending" or "dead".
        events: Number of events.
        oldest_at: When the oldest was stored, in seconds since 1970.
    """

    sink: str
    state: str
    events: int
    oldest_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalStatus:
    """The state of the journal.

    Args:
        path: The file.
        writable: Whether accepted and stored events can be written to it.
        error: Why it cannot be written; empty if it can.
        remedy: What to do about it; empty if that follows from the error.
        stored_bytes: Size of the stored events.
        limit_bytes: Maximum of `stored_bytes`: `journal.max_bytes`.
        last_confirm_at: When VOD last acknowledged a confirm, in seconds since 1970; None if it did not since the
            start.
    """

    path: str
    writable: bool
    error: str = ""
    remedy: str = ""
    stored_bytes: int = 0
    limit_bytes: int = 0
    last_confirm_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialsStatus:
    """The state of the API key. Times are in seconds since 1970.

    Args:
        provider: `credentials.provider`.
        role: The role of the temporary key; empty if there is none.
        expires_at: When the temporary key expires; None if there is none.
        is_usable: Whether requests can be signed.
        failing_since: Time of the first failed renewal since the last success; None while it works.
        error: The error of the last renewal; empty while it works.
        remedy: What to do about it; empty if that follows from the error.
    """

    provider: str = "static"
    role: str = ""
    expires_at: float | None = None
    is_usable: bool = True
    failing_since: float | None = None
    error: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadStatus:
    """The result of the last reload. Times are in seconds since 1970.

    Args:
        successful: Whether the configuration file was accepted; true after the start.
        at: When the last reload ended; None if there was none.
        last_success_at: When the configuration file was last accepted, at the start or by a reload.
        built_at: When the running configuration began to pull.
        under_way: Whether a reload is under way: then the other values are those from its beginning.
        problems: Why the last reload was refused.
    """

    successful: bool = True
    at: float | None = None
    last_success_at: float = 0.0
    built_at: float = 0.0
    under_way: bool = False
    problems: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem that keeps events from being delivered.

    Args:
        what: The part that has it: "daemon", "configuration", "journal", "source NAME", "sink NAME".
        cause: What is wrong.
        remedy: What to do.
    """

    what: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}. {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of the daemon at one moment.

    Args:
        pid: Its process id.
        version: The version of vodpoller.
        started_at: When it first began to pull, in seconds since 1970.
        at: The moment, in seconds since 1970.
        settled_events: Number of events that were settled so far.
        sources: The sources, in the configuration's order.
        sinks: The sinks, in the configuration's order.
        stored: The numbers of stored events, by sink and state.
        journal: The state of the journal.
        credentials: The state of the API key.
        reload: The result of the last reload.
    """

    pid: int
    version: str
    started_at: float
    at: float
    settled_events: int
    sources: Sequence[SourceStatus]
    sinks: Sequence[SinkStatus]
    stored: Sequence[StoredStatus]
    journal: JournalStatus
    credentials: CredentialsStatus = field(default_factory=CredentialsStatus)
    reload: ReloadStatus = field(default_factory=ReloadStatus)

    def problems(self, *, strict: bool = False) -> list[Problem]:
        """The problems that keep events from being delivered; a problem that may cause others comes first.

        Args:
            strict: Dead letters count as problems, too.
        """
        found = [
            *self._journal_problems(),
            *self._credentials_problems(),
            *self._source_problems(),
            *self._sink_problems(),
            *self._reload_problems(),
        ]
        return [*found, *_dead_letters(self.stored)] if strict else found

    def _journal_problems(self) -> Iterator[Problem]:
        if not self.journal.writable:
            yield Problem(
                what="journal",
                cause=self.journal.error or "it cannot be written",
                remedy=self.journal.remedy
                or f"Make room on the disk of {self.journal.path}, or give the file back to the user that runs "
                "vodpoller; until then events stay with VOD, up to 4 days",
            )

    def _credentials_problems(self) -> Iterator[Problem]:
        key = self.credentials
        if key.failing_since is None or self.at - key.failing_since < RENEWAL_SECS <= (key.expires_at or 0) - self.at:
            return
        until = f"the temporary key ends at {timestamp(key.expires_at)}" if key.expires_at else "no key was issued yet"
        yield Problem(
            what="credentials",
            cause=f"renewing has failed since {timestamp(key.failing_since)}, and {until}: {key.error}",
            remedy=key.remedy or f"`vodpoller check --connect` tries provider = {key.provider}",
        )

    def _reload_problems(self) -> Iterator[Problem]:
        if not self.reload.successful and self.reload.at is not None:
            yield Problem(
                what="configuration",
                cause=f"the reload at {timestamp(self.reload.at)} was refused, and the former configuration runs on: "
                + "; ".join(self.reload.problems),
                remedy="Correct it (`vodpoller check` tries it), then `vodpoller reload`",
            )

    def _source_problems(self) -> Iterator[Problem]:
        started_at = max(self.started_at, self.reload.built_at)
        for source in self.sources:
            if source.type == "callback":  # if no callback comes, there may be no event
                continue
            if source.is_pushed:
                yield Problem(
                    what=f"source {source.name}",
                    cause="reliable callbacks are off for this application: VOD sends its events by normal callbacks,"
                    " and none can be pulled",
                    remedy="Choose the reliable callback in VOD's console, or correct sub_app_id;"
                    " `vodpoller check --connect` says where",
                )
            pulled_at = source.last_pull_at or started_at
            silent_secs = self.at - pulled_at
            is_silent = silent_secs >= (PULL_SECS if source.last_pull_at else FIRST_PULL_SECS)
            has_only_failed = source.failing_since is not None and source.last_pull_at is None
            if not (is_silent or has_only_failed):
                continue
            since = timestamp(pulled_at) if source.last_pull_at else f"the start at {timestamp(started_at)}"
            ids = f" (RequestId {source.request_id})" if source.request_id else ""
            yield Problem(
                what=f"source {source.name}",
                cause=f"no pull has succeeded since {since}: {source.error or 'no answer has come yet'}{ids}",
                remedy=source.remedy
                or "Is api.endpoint right, and this machine online (proxy, firewall, DNS)? "
                "`vodpoller check --connect` tries it",
            )

    def _sink_problems(self) -> Iterator[Problem]:
        for sink in self.sinks:
            if sink.down_since is not None:
                next_try = f"; tried next at {timestamp(sink.next_try_at)}" if sink.next_try_at else ""
                yield Problem(
                    what=f"sink {sink.name}",
                    cause=f"down since {timestamp(sink.down_since)}: {sink.error}{next_try}",
                    remedy="Bring its receiver back; its events are stored meanwhile and delivered then",
                )
        yield from _removed_sinks(self.stored, [sink.name for sink in self.sinks])

    def as_line(self) -> str:
        """The line for `systemctl status`."""
        pulling = [f"{it.name}: {_pulling(it)}" for it in self.sources]
        down = ", ".join(sink.name for sink in self.sinks if sink.down_since is not None)
        numbers = {
            state: sum(stored.events for stored in self.stored if stored.state == state)
            for state in ("pending", "dead")
        }
        parts = [
            "" if self.reload.successful else "the last reload was refused",
            *pulling,
            f"sinks down: {down}" if down else "",
            "" if self.journal.writable else "the journal cannot be written",
            *(f"{number} {state}" if number else "" for state, number in numbers.items()),
            f"{self.settled_events} events settled",
        ]
        return "; ".join(filter(None, parts))

    def as_json(self, *, strict: bool = False) -> dict[str, Any]:
        """The object of `vodpoller status --json`. Times are in ISO 8601, UTC."""
        found = _with_times(asdict(self))
        return {"running": True, **found, "problems": [asdict(it) for it in self.problems(strict=strict)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentStatus:
    """What is known from the journal if no daemon answers. Times are in seconds since 1970.

    Args:
        running: Whether a process has the journal open.
        cause: Why no daemon answers.
        remedy: What to do.
        version: The version of the vodpoller that made this status.
        started_at: When a process last opened the journal; None for never.
        last_pull_at: When VOD last answered a pull; None for never.
        last_confirm_at: When VOD last acknowledged a confirm; None for never.
        at: The moment.
        sinks: Names of the configured sinks.
        stored: The numbers of stored events, by sink and state.
        path: The journal.
        limit_bytes: Maximum size of the stored events.
    """

    running: bool
    cause: str
    remedy: str
    version: str
    started_at: float | None
    last_pull_at: float | None
    last_confirm_at: float | None
    at: float
    sinks: Sequence[str]
    stored: Sequence[StoredStatus]
    path: str
    limit_bytes: int

    def problems(self, *, strict: bool = False) -> list[Problem]:
        """The same as in the status of a daemon; the first problem is that no daemon answers."""
        found = [Problem(what="daemon", cause=self.cause, remedy=self.remedy)]
        found += _removed_sinks(self.stored, self.sinks)
        return [*found, *_dead_letters(self.stored)] if strict else found

    def as_json(self, *, strict: bool = False) -> dict[str, Any]:
        """The members of a daemon's status. A value that only a daemon knows is null."""
        known = {
            "pid": None,
            "version": self.version,
            "started_at": self.started_at,
            "at": self.at,
            "settled_events": None,
            "last_pull_at": self.last_pull_at,
            "sources": [],
            "sinks": [],
            "stored": [asdict(it) for it in self.stored],
            "journal": {
                "path": self.path,
                "writable": None,
                "error": "",
                "remedy": "",
                "stored_bytes": None,
                "limit_bytes": self.limit_bytes,
                "last_confirm_at": self.last_confirm_at,
            },
            "credentials": {},
            "reload": {},
        }
        problems = [asdict(it) for it in self.problems(strict=strict)]
        return {"running": self.running, **_with_times(known), "problems": problems}


def _pulling(source: SourceStatus) -> str:
    if source.type == "callback":
        return "receiving"
    return f"cannot pull: {' | '.join(filter(None, (source.error, source.remedy)))}" if source.error else "pulling"


def _removed_sinks(stored: Sequence[StoredStatus], sinks: Iterable[str]) -> Iterator[Problem]:
    names = set(sinks)
    for found in stored:
        if found.state == "pending" and found.sink not in names:
            yield Problem(
                what=f"sink {found.sink}",
                cause=f"{found.events} stored events wait for it, and the configuration has no such sink",
                remedy=f"Bring it back, or `vodpoller deadletters replay --pending --sink {found.sink} --to SINK`,"
                f" or `vodpoller deadletters purge --pending --sink {found.sink}`",
            )


def _dead_letters(stored: Sequence[StoredStatus]) -> Iterator[Problem]:
    for found in stored:
        if found.state == "dead":
            yield Problem(
                what=f"sink {found.sink}" if found.sink else "dead letters",
                cause=f"{found.events} dead letters, the oldest since {timestamp(found.oldest_at)}",
                remedy="`vodpoller deadletters list` says why; then replay or purge them",
            )


def _with_times(value: Any) -> Any:
    match value:
        case dict():
            return {
                name: timestamp(inner) if _is_time(name) and inner is not None else _with_times(inner)
                for name, inner in value.items()
            }
        case list() | tuple():
            return [_with_times(inner) for inner in value]
        case _:
            return value


def _is_time(name: str) -> bool:
    return name == "at" or name.endswith(("_at", "_since", "_until"))
