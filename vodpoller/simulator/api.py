"""The answers to all requests to the API: pulls, confirms, and queries about the application.

A request first meets its fault, then the checks of signature and rights, then the quota, then its parameters' check.
"""

import asyncio
import dataclasses
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from random import Random
from typing import Any, Final
from uuid import UUID

import orjson

from vodpoller.logs import Logger
from vodpoller.simulator.bodies import EventGenerator
from vodpoller.simulator.control import answer_control
from vodpoller.simulator.errors import ApiError
from vodpoller.simulator.feeding import Feeder
from vodpoller.simulator.issuing import ASSUME_ROLE, METADATA_PATH, Issuing, parameters_in
from vodpoller.simulator.options import (
    ACTIONS,
    CONTROLLABLE,
    HANDLES_MAX,
    PUSH,
    SWITCHES,
    Fault,
    SimulatorOptions,
    faults_by_action,
    is_whole,
    parse_faults,
)
from vodpoller.simulator.pushing import Pusher
from vodpoller.simulator.queue import EventQueue, ForgottenHandlesError, LedgerRow, StaleHandlesError
from vodpoller.simulator.server import REASONS, Connection, Request
from vodpoller.simulator.signature import Key, verify

_VERSION: Final = "2018-07-17"
_PARAMETERS: Final[Mapping[str, frozenset[str]]] = {
    "PullEvents": frozenset({"SubAppId", "ExtInfo"}),
    "ConfirmEvents": frozenset({"SubAppId", "ExtInfo", "EventHandles"}),
    "DescribeEventConfig": frozenset({"SubAppId"}),
    "DescribeEventsState": frozenset({"SubAppId"}),
}
_STATE_REQUESTS_PER_SEC: Final = 20.0  # of DescribeEventsState (product/266/57589)
_EMPTY_FORMS: Final[Mapping[str, bytes]] = {
    "null": b'"EventSet":null,',
    "error": b'"Error":{"Code":"ResourceNotFound","Message":"no event"},',
    "list": b'"EventSet":[],',
    "absent": b"",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One request to the API that is not answered yet."""

    action: str
    fault: Fault | None
    request: Request
    connection: Connection
    started_at: float


class SlidingSecond:
    """Counts the occurrences in the last second."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.peak = 0

    def count(self, now: float) -> int:
        """Number of occurrences after `now` minus one second."""
        while self._times and self._times[0] <= now - 1:
            self._times.popleft()
        return len(self._times)

    def add(self, now: float) -> None:
        """Add an occurrence."""
        self._times.append(now)
        self.peak = max(self.peak, self.count(now))


class Api:
    """The API and the control endpoints for one queue, in one event loop.

    Args:
        options: The options.
        log: Gets a debug line for each answer; None: no lines.
        warn: Called with a text about a client that does not send HTTP.
    """

    def __init__(self, options: SimulatorOptions, log: Logger | None, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self._options = options
        self._log = log
        seed = secrets.randbits(63) if options.seed is None else options.seed
        self._random = Random(seed)  # noqa: S311 - for faults and handles, not for secrets
        self._faults: Mapping[str, tuple[tuple[Fault, float], ...]] = faults_by_action(options.faults)
        self._queue = EventQueue(
            visibility_secs=options.visibility_secs,
            generator=EventGenerator(seed),
            random=self._random,
            forget_confirms=options.forget_confirms,
            keep_bodies=options.keep_bodies,
            wall_offset_secs=time.time() - time.monotonic(),
        )
        self._issuing = Issuing(self._random)
        self._date_second = 0
        self._date = b""
        self._empties = 0
        self._hanging: dict[_Call, asyncio.TimerHandle] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self._feeder = Feeder(options, self._queue, on_fed=self._wake)
        self._pusher = Pusher(
            lambda: self._options,
            self._queue,
            random=self._random,
            draw_fault=partial(self._draw_fault, PUSH),
            now=self._now,
        )
        self._accepted = {action: SlidingSecond() for action in ACTIONS}
        self._arrived = {action: SlidingSecond() for action in ACTIONS}
        self._counts: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._faulted: Counter[str] = Counter()
        self.bad_requests = 0
        self.connections: set[Connection] = set()

    # --- running ---

    async def run(self, ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Serve until `stop` is set.

        Args:
            ready: Called with the base URL once connections are accepted.
            stop: Setting it ends the API and all connections.

        Raises:
            OSError: The address cannot be used, or the events' file cannot be read.
        """
        options = self._options
        loop = asyncio.get_running_loop()
        self._feeder.read_file()
        server = await loop.create_server(lambda: Connection(self), options.host, options.port, backlog=1024)
        try:
            self._pusher.start()
            self._feeder.start()
            self._wake()
            host, port = server.sockets[0].getsockname()[:2]
            ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            await stop.wait()
        finally:
            server.close()
            await self._pusher.stop()
            for call in list(self._hanging):
                self._stop_hanging(call)
            for connection in list(self.connections):
                connection.drop()
            await asyncio.sleep(0)  # one turn of the loop, in which the transports close their sockets
            await server.wait_closed()

    def date(self) -> bytes:
        """The value of the `Date` header, by the simulator's own clock."""
        second = int(self._now())
        if second != self._date_second:
            self._date_second = second
            self._date = formatdate(second, usegmt=True).encode()
        return self._date

    def _now(self) -> float:
        return time.time() + self._options.clock_skew_secs

    # --- requests ---

    def handle(self, request: Request, connection: Connection) -> None:
        """Answer a request on its connection, now or later."""
        life_secs = self._options.credential_secs
        if life_secs and request.method == "GET" and request.target.startswith(METADATA_PATH):
            self._issuing.answer_metadata(request.target, connection, life_secs=life_secs, now=self._now())
            return
        if request.method != "POST" or request.target != "/":
            answer_control(self, request, connection)
            return
        action = request.headers.get("x-tc-action", "")
        call = _Call(
            action=action,
            fault=self._draw_fault(action),
            request=request,
            connection=connection,
            started_at=time.monotonic(),
        )
        _after(self._options.rtt_secs / 2, partial(self._serve, call))

    def _draw_fault(self, action: str) -> Fault | None:
        for fault, probability in self._faults.get(action, ()):
            if self._random.random() < probability:
                self._faulted[f"{ACTIONS.get(action, action)}.{fault}"] += 1
                return fault
        return None

    def _serve(self, call: _Call) -> None:
        is_known = call.action in ACTIONS or (call.action == ASSUME_ROLE and self._options.credential_secs)
        self._requests[call.action if is_known else "other"] += 1
        if call.action in ACTIONS:
            self._arrived[call.action].add(time.monotonic())
        if call.fault == "reset":
            call.connection.reset()
            return
        if call.fault == "http_5xx":
            status = self._random.choice((500, 502, 503, 504))
            page = b"<html><body>%b</body></html>" % REASONS[status]
            send = partial(call.connection.send, page, status=status, content_type=b"text/html")
            _after(self._options.rtt_secs / 2, send)
            return
        try:
            _raise_fault(call.fault)
            if call.action == ASSUME_ROLE and self._options.credential_secs:
                self._reply(call, self._assume_role(call))
                return
            self._authorize(call)
            self._limit(call.action)
            self._execute(call, self._parameters(call))
        except ApiError as error:
            self._errors[error.code] += 1
            self._reply(call, _error(error.code, str(error)), code=error.code)

    def _assume_role(self, call: _Call) -> bytes:
        options = self._options
        if options.secret_id is not None:
            self._verify(call.request, key_of=self._permanent_key_of, service="sts")
        return self._issuing.assume_role(call.request, life_secs=options.credential_secs, now=self._now())

    def _authorize(self, call: _Call) -> None:
        options, headers = self._options, call.request.headers
        for name in ("X-TC-Action", "X-TC-Version"):
            if name.lower() not in headers:
                raise ApiError("MissingParameter", f"The request lacks the header {name}.")
        if call.action not in ACTIONS:
            raise ApiError("InvalidAction", f"The simulator knows {', '.join(ACTIONS)}, not {call.action}.")
        if headers["x-tc-version"] != _VERSION:
            raise ApiError("NoSuchVersion", f"The version of this API is {_VERSION}.")
        if options.secret_id is not None or options.credential_secs:
            self._verify(call.request, key_of=self._key_of, service="vod")
        if call.action in options.deny:
            raise ApiError("UnauthorizedOperation", f"The key has no right to vod:{call.action}.")

    def _verify(self, request: Request, *, key_of: Callable[[str], Key | None], service: str) -> None:
        for name in ("X-TC-Timestamp", "Authorization"):
            if name.lower() not in request.headers:
                raise ApiError("MissingParameter", f"The request lacks the header {name}.")
        verify(request, key_of=key_of, now=self._now(), service=service)

    def _key_of(self, secret_id: str) -> Key | None:
        return self._permanent_key_of(secret_id) or self._issuing.key_of(secret_id)

    def _permanent_key_of(self, secret_id: str) -> Key | None:
        options = self._options
        if options.secret_key is None or secret_id != options.secret_id:
            return None
        return Key(secret_key=options.secret_key, token=options.token)

    def _limit(self, action: str) -> None:
        quota = self._options.requests_per_sec
        if action == "ConfirmEvents" and self._options.confirms_per_sec is not None:
            quota = self._options.confirms_per_sec
        if action == "DescribeEventsState":
            quota = min(quota, _STATE_REQUESTS_PER_SEC)
        if not quota:
            return
        now = time.monotonic()
        if self._accepted[action].count(now) >= quota:
            self._counts["refused_by_limit"] += 1
            raise ApiError("RequestLimitExceeded", f"{action} may be called {quota:g} times per second.")
        self._accepted[action].add(now)

    def _parameters(self, call: _Call) -> dict[str, Any]:
        parameters = parameters_in(call.request)
        if unknown := sorted(parameters.keys() - _PARAMETERS[call.action]):
            raise ApiError("UnknownParameter", f"{call.action} has no parameter {unknown[0]}.")
        sub_app_id = parameters.get("SubAppId")
        if sub_app_id is not None and not is_whole(sub_app_id):
            raise ApiError("InvalidParameter", "SubAppId is an integer.")
        if self._options.sub_app_id is not None and sub_app_id != self._options.sub_app_id:
            if call.action == "PullEvents":
                raise ApiError("ResourceNotFound.UserNotExist", "The SubAppId is not found.")
            raise ApiError("InvalidParameterValue.SubAppId", "The SubAppId is not found.")
        return parameters

    def _execute(self, call: _Call, parameters: Mapping[str, Any]) -> None:
        match call.action:
            case "PullEvents":
                self._pull(call)
            case "ConfirmEvents":
                self._confirm(parameters)
                self._reply(call, b"")
            case "DescribeEventConfig":
                self._reply(call, self._event_config())
            case _:
                self._queue.expire()
                self._reply(call, b'"CountOfEventsToPull":%d,' % self._queue.visible)

    def _event_config(self) -> bytes:
        off = self._options.events_off
        switches = {member: "OFF" if event_type in off else "ON" for event_type, member in SWITCHES.items()}
        mode = "PUSH" if self._options.has_push_mode else "PULL"
        members = {"Mode": mode, "NotificationUrl": self._options.push or "", **switches}
        return orjson.dumps(members)[1:-1] + b","

    def _confirm(self, parameters: Mapping[str, Any]) -> None:
        options = self._options
        handles = parameters.get("EventHandles")
        if handles is None:
            raise ApiError("MissingParameter", "EventHandles is missing.")
        if not isinstance(handles, list) or not all(isinstance(handle, str) for handle in handles):
            raise ApiError("InvalidParameter", "EventHandles is a list of strings.")
        if not 1 <= len(handles) <= HANDLES_MAX:
            raise ApiError("InvalidParameter", f"EventHandles takes 1 to {HANDLES_MAX} handles.")
        if parameters.get("SubAppId") in options.refuse_confirms_of:
            raise ApiError("InvalidParameterValue", "The application has no such handles.")
        try:
            self._queue.confirm(handles, atomic=options.stale == "atomic")
        except StaleHandlesError as error:
            self._counts["confirms_stale"] += 1
            raise ApiError("InvalidParameterValue.EventHandle", f"{error}.") from error
        except ForgottenHandlesError as error:
            raise ApiError("InvalidParameterValue", f"{error}.") from error
        self._counts["confirms"] += 1

    # --- pulling ---

    def _pull(self, call: _Call) -> None:
        if call.connection.closed:
            self._counts["pulls_abandoned"] += 1
            return
        elements = [] if self._options.has_push_mode else self._queue.take(self._options.batch)
        if elements:
            self._answer_pull(call, elements)
        elif self._options.poll_secs:
            timer = asyncio.get_running_loop().call_later(self._options.poll_secs, self._answer_empty, call)
            self._hanging[call] = timer
            call.connection.on_lost = partial(self._abandon, call)
        else:
            self._answer_empty(call)

    def _answer_pull(self, call: _Call, elements: Sequence[bytes]) -> None:
        self._schedule_expiry()
        self._counts["pulls"] += 1
        self._reply(call, b'"EventSet":[%b],' % b",".join(elements), events=len(elements))

    def _answer_empty(self, call: _Call) -> None:
        self._stop_hanging(call)
        self._counts["pulls"] += 1
        self._counts["pulls_empty"] += 1
        form: str = self._options.empty
        if form == "mixed":
            form = tuple(_EMPTY_FORMS)[self._empties % len(_EMPTY_FORMS)]
            self._empties += 1
        self._reply(call, _EMPTY_FORMS[form], events=0)

    def _stop_hanging(self, call: _Call) -> None:
        timer = self._hanging.pop(call, None)
        if timer is not None:
            timer.cancel()
            call.connection.on_lost = None

    def _abandon(self, call: _Call) -> None:
        self._stop_hanging(call)
        self._counts["pulls_abandoned"] += 1

    def _wake(self) -> None:
        """Push the visible events, or answer hanging pulls with them, the oldest pull first."""
        self._pusher.push()
        while not self._options.has_push_mode and self._hanging and self._queue.visible:
            call = next(iter(self._hanging))
            self._stop_hanging(call)
            if call.connection.closed:
                self._counts["pulls_abandoned"] += 1
            else:
                self._answer_pull(call, self._queue.take(self._options.batch))

    def _schedule_expiry(self) -> None:
        at = self._queue.next_expiry
        if self._expiry is None and at is not None:
            wait_secs = max(at - time.monotonic(), 0.0)
            self._expiry = asyncio.get_running_loop().call_later(wait_secs, self._expire_leases)

    def _expire_leases(self) -> None:
        self._expiry = None
        self._queue.expire()
        self._wake()
        self._schedule_expiry()

    def _reply(self, call: _Call, members: bytes, *, code: str = "", events: int | None = None) -> None:
        """Send the answer after the second half of the round trip, with the effect of the call's fault."""
        request_id = str(UUID(int=self._random.getrandbits(128), version=4))
        body = b'{"Response":{%b"RequestId":"%b"}}' % (members, request_id.encode())
        if self._log is not None:
            fields = {"error_code": code or None, "events": events, "fault": call.fault}
            self._log.debug(
                "simulator.answered",
                action=call.action,
                request_id=request_id,
                duration_secs=round(time.monotonic() - call.started_at, 6),
                **{name: value for name, value in fields.items() if value is not None},
            )
        send: Callable[[], None] = partial(call.connection.send, body)
        delay_secs = self._options.rtt_secs / 2
        match call.fault:
            case "lost":
                send = call.connection.cut
            case "truncated":
                at = self._random.randrange(1, len(body))
                # Either the connection breaks within the body, or the cut body has a matching Content-Length.
                is_framed = self._random.random() < 0.5  # noqa: PLR2004 - each with the same probability
                send = partial(call.connection.send, body[:at] if is_framed else body, cut_at=None if is_framed else at)
            case "slow":
                delay_secs += self._options.slow_secs
            case _:
                pass
        _after(delay_secs, send)

    # --- control ---

    def feed(self, bodies: Iterable[bytes]) -> int:
        """Add events to the queue, and answer the hanging pulls."""
        count = self._queue.feed(bodies)
        self._wake()
        return count

    def control(self, changes: Mapping[str, Any]) -> None:
        """Change options.

        Raises:
            ValueError: An option is unknown, cannot be changed while running, or has an invalid value.
        """
        if unknown := sorted(changes.keys() - CONTROLLABLE):
            raise ValueError(f"{unknown[0]}: cannot be changed while running; {', '.join(sorted(CONTROLLABLE))} can")
        values = dict(changes)
        if isinstance(values.get("faults"), str):
            values["faults"] = parse_faults(values["faults"])
        self._options = dataclasses.replace(self._options, **values)
        self._faults = faults_by_action(self._options.faults)
        self._wake()  # the mode may have changed

    def ledger(self, *, start: int, count: int | None, bodies: bool, lost: bool) -> list[LedgerRow]:
        """See `EventQueue.ledger`."""
        return self._queue.ledger(start=start, count=count, bodies=bodies, lost=lost)

    def stats(self) -> dict[str, Any]:
        """See `Simulator.stats`."""
        return {
            **{name: self._counts[name] for name in _COUNTED},
            "pulls_hanging_now": len(self._hanging),
            "requests": dict(self._requests),
            "errors": dict(self._errors),
            "faults": dict(self._faulted),
            "bad_requests": self.bad_requests,
            "credentials_issued": self._issuing.issued,
            "peak_requests_per_sec": {action: arrived.peak for action, arrived in self._arrived.items()},
            "connections_now": len(self.connections),
            "feeding": self._feeder.is_feeding,
            **self._pusher.stats(),
            **self._queue.stats(),
        }


_COUNTED: Final = ("pulls", "pulls_empty", "pulls_abandoned", "confirms", "confirms_stale", "refused_by_limit")


def _raise_fault(fault: Fault | None) -> None:
    if fault == "internal_error":
        raise ApiError("InternalError", "Something broke inside the service.")
    if fault == "limit":
        raise ApiError("RequestLimitExceeded", "The quota of this action is used up.")


def _after(delay_secs: float, act: Callable[[], None]) -> None:
    if delay_secs > 0:
        asyncio.get_running_loop().call_later(delay_secs, act)
    else:
        act()


def _error(code: str, message: str) -> bytes:
    return b'"Error":%b,' % orjson.dumps({"Code": code, "Message": message})
