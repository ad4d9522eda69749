"""Checks of VOD: the key and its right to confirm, the settings of callbacks, the waiting events, and the clock."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from vodpoller.checkup.finding import Finding, Level
from vodpoller.clock import timestamp
from vodpoller.config.tables import Route, Source
from vodpoller.errors import NoKeyError, OperatorError, RefusedHandlesError, VodpollerError
from vodpoller.httpclient.address import host_and_port
from vodpoller.router import Router
from vodpoller.vod.answers import is_missing_right
from vodpoller.vod.application import EVENT_CONFIG, EVENTS_STATE, SWITCHED_TYPES, EventConfig
from vodpoller.vod.client import VodClient
from vodpoller.vod.refresher import Refresher

CLOCK_TOLERANCE_SECS: Final = 60.0
IMPOSSIBLE_HANDLE: Final = "vodpoller-check"
_NO_ANSWER: Final = "VOD did not answer"
_CONSOLE: Final = "VOD console, Callback settings"


def check_role(refresher: Refresher) -> Finding:
    """Request a temporary key of the role.

    Args:
        refresher: One that has not been called yet.
    """
    with suppress(NoKeyError):
        refresher()
    key = refresher.status()
    if key.expires_at is None:
        return Finding(what="credentials", level=Level.PROBLEM, text=key.error, remedy=key.remedy)
    return Finding(
        what="credentials",
        level=Level.GOOD,
        text=f"{key.role}: a key until {timestamp(key.expires_at)}, renewed by itself (provider {key.provider})",
    )


def check_source(vod: VodClient, source: Source, routes: Sequence[Route]) -> Iterator[Finding]:
    """Check a source at VOD, as far as the rights of its key allow.

    Args:
        vod: The client of VOD.
        source: The source.
        routes: All routes of the configuration.
    """
    error = _error_of_confirm(vod, source)
    yield _key_finding(source, error)
    if isinstance(error, RefusedHandlesError | None) or is_missing_right(error):
        yield from _check_callback(vod, source, routes)
        yield _check_backlog(vod, source)


def _error_of_confirm(vod: VodClient, source: Source) -> VodpollerError | None:
    """Confirm a handle that cannot exist: VOD refuses it only if key, right and SubAppId are correct."""
    try:
        vod.confirm(source.sub_app_id, [IMPOSSIBLE_HANDLE])
    except VodpollerError as error:
        return error
    return None


def _key_finding(source: Source, error: VodpollerError | None) -> Finding:
    what = f"source {source.name}"
    match error:
        case None | RefusedHandlesError():
            request = _request_id_in(error) if error else ""
            text = (
                f"VOD accepts the key and lets it confirm{request}; the right to pull is not tested, because a pull"
                " takes events"
            )
            return Finding(what=what, level=Level.GOOD, text=text)
        case OperatorError():
            return Finding(
                what=what, level=Level.PROBLEM, text=f"{error.message}{_request_id_in(error)}", remedy=error.advice
            )
        case _:
            remedy = "" if error.request_id else "is api.endpoint right, and this machine online?"
            return Finding(what=what, level=Level.PROBLEM, text=f"{error}{_request_id_in(error)}", remedy=remedy)


def _request_id_in(error: VodpollerError) -> str:
    return f" (RequestId {error.request_id})" if error.request_id else ""


# --- the settings of callbacks ----------------------------------------------------------------------------------------


def _check_callback(vod: VodClient, source: Source, routes: Sequence[Route]) -> Iterator[Finding]:
    what = f"callback of {source.name}"
    try:
        config = vod.event_config(source.sub_app_id)
    except VodpollerError as error:
        yield _not_checked(what, EVENT_CONFIG, "the settings of callbacks", error)
        return
    yield _mode_finding(what, config)
    if config.mode != "PUSH":
        wanted = _WantedTypes(source, routes)
        yield from _switch_findings(what, wanted, config)
        yield from _console_only_findings(what, wanted)


def _mode_finding(what: str, config: EventConfig) -> Finding:
    match config.mode:
        case "PULL":
            return Finding(what=what, level=Level.GOOD, text="reliable callbacks are on")
        case "PUSH":
            return Finding(
                what=what,
                level=Level.PROBLEM,
                text="reliable callbacks are off for this application: VOD sends its events"
                f"{_receiver_of(config)} by normal callbacks, and none can be pulled",
                remedy=f"{_CONSOLE}: choose the reliable callback. This ends the normal ones, so make sure first that"
                " their receiver is no longer needed. Or does sub_app_id name the wrong application?",
            )
        case other:
            return Finding(
                what=what,
                level=Level.INFORMATION,
                text=f"VOD reports an unknown mode of callbacks ({other[:40]!r})",
                remedy=f"{_CONSOLE}: is the reliable callback chosen?",
            )


def _receiver_of(config: EventConfig) -> str:
    """Host and port of the receiver of normal callbacks; the other parts of its URL may be secret."""
    try:
        return f" to {host_and_port(config.notification_url)}" if urlsplit(config.notification_url).hostname else ""
    except ValueError:
        return ""


class _WantedTypes:
    """The types that the routes of one source want.

    Args:
        source: The source.
        routes: All routes of the configuration.
    """

    def __init__(self, source: Source, routes: Sequence[Route]) -> None:
        self._source = source
        of_source = [route for route in routes if route.sources is None or source.name in route.sources]
        self._naming = [route for route in of_source if route.event_types and "*" not in route.event_types]
        self.globs = list(dict.fromkeys(glob for route in self._naming for glob in route.event_types or ()))
        self.everything = len(self._naming) < len(of_source)

    def by_name(self, event_type: str) -> list[str]:
        """The routes that want a type because of their `event_types`, not because they take every type."""
        return Router(self._naming).routes_for(self._source.name, event_type)


def _switch_findings(what: str, wanted: _WantedTypes, config: EventConfig) -> Iterator[Finding]:
    """Types that are switched off although a route wants them."""
    for event_type in config.off:
        wanting = wanted.by_name(event_type)
        if wanting:
            yield Finding(
                what=what,
                level=Level.WARNING,
                text=f"{event_type} is switched off, so that no event of this type comes; routes that want it:"
                f" {', '.join(wanting)}",
                remedy=f"{_CONSOLE}: switch it on; or remove the type from these routes",
            )
        elif wanted.everything:
            text = f"{event_type} is switched off: no event of this type comes"
            yield Finding(what=what, level=Level.INFORMATION, text=text)


def _console_only_findings(what: str, wanted: _WantedTypes) -> Iterator[Finding]:
    """The wanted types for which VOD does not report whether it sends them."""
    unseen = [glob for glob in wanted.globs if glob not in SWITCHED_TYPES]
    if wanted.everything:
        unseen.append(f"{'all other types' if unseen else 'all types'} but {', '.join(SWITCHED_TYPES)}")
    if unseen:
        yield Finding(
            what=what,
            level=Level.INFORMATION,
            text=f"whether VOD sends these can be seen in its console only: {', '.join(unseen)}",
            remedy=f"if they do not come, tick them in the {_CONSOLE}",
        )


# --- waiting events ---------------------------------------------------------------------------------------------------


def _check_backlog(vod: VodClient, source: Source) -> Finding:
    what = f"queue of {source.name}"
    try:
        waiting = vod.waiting_events(source.sub_app_id)
    except VodpollerError as error:
        return _not_checked(what, EVENTS_STATE, "the number of waiting events", error)
    if not waiting:
        return Finding(what=what, level=Level.GOOD, text="no event waits at VOD, by its count of the last 3 minutes")
    return Finding(
        what=what,
        level=Level.INFORMATION,
        text=f"{waiting:,} events wait at VOD, by its count of the last 3 minutes. If vodpoller is stopped, it begins"
        " with these when it starts; VOD keeps an event for 4 days",
        remedy="if it runs and the number grows, see `vodpoller status`: a sink or the quota is too slow",
    )


def _not_checked(what: str, action: str, about: str, error: VodpollerError) -> Finding:
    if is_missing_right(error):
        return Finding(
            what=what,
            level=Level.INFORMATION,
            text=f"not checked: the key has no right to read {about}",
            remedy=f"to have this checked, allow vod:{action} in CAM, too; vodpoller runs without it",
        )
    return Finding(what=what, level=Level.WARNING, text=f"not checked: {error}{_request_id_in(error)}")


# --- the clock --------------------------------------------------------------------------------------------------------


def check_clock(vod: VodClient) -> Finding:
    """Compare this machine's clock with that of VOD's last answer."""
    skew_secs = vod.skew_secs
    if skew_secs is None:
        why = "the answer has no Date that can be read (does a proxy remove it?)" if vod.has_answered else _NO_ANSWER
        return Finding(what="clock", level=Level.WARNING, text=f"not compared: {why}")
    text = f"this machine's clock is {abs(skew_secs):.0f} s {'behind' if skew_secs > 0 else 'ahead of'} VOD's"
    if abs(skew_secs) <= CLOCK_TOLERANCE_SECS:
        return Finding(what="clock", level=Level.GOOD, text=text)
    return Finding(
        what="clock",
        level=Level.WARNING,
        text=f"{text}; vodpoller signs with VOD's time until this is corrected",
        remedy="synchronize it (NTP)",
    )
