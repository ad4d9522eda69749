"""The options of the simulator: which of them may be changed while it runs, and which faults can be switched on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

Empty = Literal["null", "error", "list", "absent", "mixed"]
Stale = Literal["atomic", "per_handle"]
Mode = Literal["PULL", "PUSH"]
Fault = Literal["reset", "http_5xx", "internal_error", "limit", "truncated", "slow", "lost"]

FAULTS: Final[tuple[Fault, ...]] = get_args(Fault)
PUSH: Final = "push"  # the prefix of the faults of pushes, like the values of ACTIONS
PUSH_FAULTS: Final[tuple[Fault, ...]] = ("reset", "slow", "lost")
CONTROLLABLE: Final = frozenset(
    {
        "batch",
        "clock_skew_secs",
        "confirms_per_sec",
        "credential_secs",
        "deny",
        "empty",
        "events_off",
        "faults",
        "mode",
        "poll_secs",
        "push",
        "refuse_confirms_of",
        "requests_per_sec",
        "rtt_secs",
        "secret_id",
        "secret_key",
        "slow_secs",
        "stale",
        "sub_app_id",
        "token",
    }
)

HANDLES_MAX: Final = 16  # of a confirm; also the maximum number of events in an answer
ACTIONS: Final[Mapping[str, str]] = {
    "PullEvents": "pull",
    "ConfirmEvents": "confirm",
    "DescribeEventConfig": "config",
    "DescribeEventsState": "state",
}
# The event types in the answer of `DescribeEventConfig`, each with the member that says whether VOD sends it.
SWITCHES: Final[Mapping[str, str]] = {
    "NewFileUpload": "UploadMediaCompleteEventSwitch",
    "FileDeleted": "DeleteMediaCompleteEventSwitch",
    "PersistenceComplete": "PersistenceCompleteEventSwitch",
}

_SECS: Final = ("credential_secs", "rate", "poll_secs", "visibility_secs", "requests_per_sec", "rtt_secs", "slow_secs")
_COUNTS: Final = ("events", "feed", "forget_confirms", "port")
_CHOICES: Final = {"empty": get_args(Empty), "mode": (None, *get_args(Mode)), "stale": get_args(Stale)}
_TEXTS: Final = ("push", "push_sign_key", "secret_id", "secret_key", "token")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorOptions:
    """The options of the simulator. Those in `CONTROLLABLE` can be changed while it runs.

    Args:
        host: The address to listen on.
        port: The port to listen on; 0: a free port.
        events: Number of generated events that are in the queue at the start.
        rate: Number of events per second that are added to the queue while it runs; 0: none. They are the lines of
            `events_file` if it is given, else generated events.
        feed: Total number of events that `rate` adds; 0: no limit (or all lines of `events_file`).
        events_file: A file with one callback body per line. Each line is sent as it is, even if it is not valid JSON:
            the handle is inserted after its first `{`; a line that does not start with `{` is sent without a handle.
            Blank lines are skipped. If `rate` is 0, all lines are added at the start.
        poll_secs: Time for which a pull of an empty queue waits for events; 5 at VOD. 0: it is answered immediately.
        visibility_secs: The lease of a pulled event, from the moment when the answer is made; 30 at VOD.
        batch: Maximum number of events in the answer to a pull, 1 to 16; 16 at VOD.
        secret_id: The SecretId with which requests must be signed. If `secret_id` and `secret_key` are None, nothing is
            verified.
        secret_key: The SecretKey that belongs to `secret_id`.
        token: The temporary token that signed requests must carry; None: no token.
        credential_secs: The lifetime of temporary keys, which a metadata service and AssumeRole of STS issue at the
            same address; 0: there are no such services. Requests to VOD must be signed with an issued key or with
            `secret_id`; requests to AssumeRole with `secret_id`, if it is given.
        requests_per_sec: The quota of each action, in any interval of one second; 0: no limit. 100 at VOD.
        confirms_per_sec: The quota of ConfirmEvents; None: `requests_per_sec`.
        rtt_secs: Round-trip time of each API request: half of it passes before the request is read, half after it is
            processed.
        empty: The answer to a pull of an empty queue: an `EventSet` that is null, the error `ResourceNotFound`, an
            empty list, no `EventSet` at all, or each of them in turn ("mixed").
        stale: The effect of a stale or refused handle on the other handles of its confirm, which fails: none of them is
            confirmed ("atomic"), or they are confirmed ("per_handle"). Tencent does not document which is right.
        sub_app_id: The only SubAppId that exists; None: every SubAppId is accepted, and also none.
        mode: The mode in the answer of `DescribeEventConfig`: "PULL" for reliable callbacks, "PUSH" for normal ones.
            In mode "PUSH", pulls get no events; new events are pushed to `push`, or stay in the queue without it.
            None: "PUSH" if `push` is given, else "PULL".
        push: The URL to which events are posted, each unchanged and on its own connection, and all events of the queue
            at the same time. None: events are not pushed.
        push_sign_key: The key of the member `Sign` in the body of each push; `T` is 10 minutes ahead. None: no `Sign`.
        push_limit_secs: Time limit of a push, from the start of its connection to the head of its answer; 5 at VOD.
        push_tries: Maximum number of pushes of an event; 3 at VOD. The next one begins as soon as one has ended without
            an answer. Every answer counts, whatever its status. An event without an answer is lost.
        events_off: The types of `SWITCHES` that are off in the answer of `DescribeEventConfig`. This does not affect
            which events are sent.
        deny: The actions for which the key has no right: they are answered with `UnauthorizedOperation`.
        refuse_confirms_of: The SubAppIds whose confirms are all refused with `InvalidParameterValue`, although their
            pulls get events: as if each confirm named another application than the pull.
        faults: Probability of each fault of `FAULTS`, 0 to 1. A name with a prefix is a fault of one action only:
            "pull.reset", "confirm.lost", "config.limit", "state.slow". With `reset`, `http_5xx`, `internal_error` and
            `limit` the request is not processed. With `truncated`, `slow` and `lost` it is processed, and the answer is
            cut off, late by `slow_secs`, or never sent. Three of them exist for pushes ("push.lost"): `reset` breaks
            the connection in the middle of the request or after it, `slow` makes the answer late, and with `lost` the
            answer never arrives. At least one push of each event has no fault.
        slow_secs: The delay of the fault `slow`, in seconds.
        seed: Seed of all random decisions and of the generated events' ids. None: a new seed, so that no two runs have
            the same events.
        forget_confirms: Number of handles (the first ones to be confirmed) that every confirm refuses with
            `InvalidParameterValue` until their lease ends. Their events come again, and can then be confirmed. `stale`
            decides on the other handles of such a confirm.
        clock_skew_secs: Difference of the simulator's clock to this machine's clock, for its `Date` header and for the
            check of a request's timestamp; positive: the simulator's clock is ahead.
        keep_bodies: Keep the bodies of confirmed events for the ledger. Generated bodies need no memory, and are always
            available.

    Raises:
        ValueError: A value is out of its bounds. The text says which one, and what would be right.
    """

    host: str = "127.0.0.1"
    port: int = 0
    events: int = 0
    rate: float = 0.0
    feed: int = 0
    events_file: Path | None = None
    poll_secs: float = 5.0
    visibility_secs: float = 30.0
    batch: int = 16
    secret_id: str | None = None
    secret_key: str | None = None
    token: str | None = None
    credential_secs: float = 0.0
    requests_per_sec: float = 100
    confirms_per_sec: float | None = None
    rtt_secs: float = 0.0
    empty: Empty = "null"
    stale: Stale = "atomic"
    sub_app_id: int | None = None
    mode: Mode | None = None
    push: str | None = None
    push_sign_key: str | None = None
    push_limit_secs: float = 5.0
    push_tries: int = 3
    events_off: Sequence[str] = ()
    deny: Sequence[str] = ()
    refuse_confirms_of: Sequence[int] = ()
    faults: Mapping[str, float] = field(default_factory=dict)
    slow_secs: float = 3.0
    seed: int | None = None
    forget_confirms: int = 0
    clock_skew_secs: float = 0.0
    keep_bodies: bool = False

    def __post_init__(self) -> None:
        for is_right, problem in self._checks():
            if not is_right:
                raise ValueError(problem)
        _check_faults(self.faults)

    @property
    def has_push_mode(self) -> bool:
        """Whether the application is set to normal callbacks."""
        return self.mode == "PUSH" or (self.mode is None and self.push is not None)

    def _checks(self) -> Iterator[tuple[bool, str]]:
        """The results of all checks of the values, each with the text of its error."""
        for name in _SECS:
            value = getattr(self, name)
            yield _is_number(value) and value >= 0, f"{name}: {value!r} is not a number of 0 or more"
        for name in _COUNTS:
            value = getattr(self, name)
            yield is_whole(value) and value >= 0, f"{name}: {value!r} is not a whole number of 0 or more"
        for name in _TEXTS:
            yield isinstance(getattr(self, name), str | None), f"{name}: must be a string"
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            yield value in choices, f"{name}: {value!r} is not one of {', '.join(filter(None, choices))}"
        confirms = self.confirms_per_sec
        is_quota = confirms is None or (_is_number(confirms) and confirms >= 0)
        yield is_quota, f"confirms_per_sec: {confirms!r} is not a number of 0 or more"
        skew, batch, app = self.clock_skew_secs, self.batch, self.sub_app_id
        both_or_none = (self.secret_id is None) == (self.secret_key is None)
        yield _is_number(skew), f"clock_skew_secs: {skew!r} is not a number"
        yield is_whole(batch) and 1 <= batch <= HANDLES_MAX, f"batch: {batch!r} is not 1 to {HANDLES_MAX}"
        yield app is None or is_whole(app), f"sub_app_id: {app!r} is not a whole number"
        limit, tries = self.push_limit_secs, self.push_tries
        yield self.push is None or _is_url(self.push), f"push: {self.push!r} is not like http://127.0.0.1:8080/path"
        yield _is_number(limit) and limit > 0, f"push_limit_secs: {limit!r} is not a number above 0"
        yield is_whole(tries) and tries > 0, f"push_tries: {tries!r} is not a whole number above 0"
        for name, is_right, what in _LISTS:
            values = getattr(self, name)
            yield isinstance(values, list | tuple), f"{name}: {values!r} is not a list"
            for value in values:
                yield is_right(value), f"{name}: {value!r} is not {what}"
        yield both_or_none, "secret_id, secret_key: give both, or neither to verify nothing"
        yield not self.feed or self.rate > 0, "feed: needs a rate; for events that are there at the start, use events"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        is_whole_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        return is_whole_url and url.username is None and text.isascii() and " " not in text
    except ValueError:  # the port, or the brackets of an address, are not valid
        return False


def _is_action(value: object) -> bool:
    return isinstance(value, str) and value in ACTIONS


def _is_switched(value: object) -> bool:
    return isinstance(value, str) and value in SWITCHES


_LISTS: Final[tuple[tuple[str, Callable[[object], bool], str], ...]] = (
    ("deny", _is_action, f"one of {', '.join(ACTIONS)}"),
    ("events_off", _is_switched, f"one of {', '.join(SWITCHES)}"),
    ("refuse_confirms_of", is_whole, "a whole number"),
)


def _check_faults(faults: object) -> None:
    if not isinstance(faults, Mapping):
        raise ValueError("faults: must map the name of a fault to its probability")  # noqa: TRY004 - one error for all
    for name, probability in faults.items():
        prefix, _, fault = str(name).rpartition(".")
        if fault not in (PUSH_FAULTS if prefix == PUSH else FAULTS) or prefix not in ("", PUSH, *ACTIONS.values()):
            known, pushed = ", ".join(FAULTS), ", ".join(f"{PUSH}.{fault}" for fault in PUSH_FAULTS)
            narrowed = ", ".join(f"{prefix}.NAME" for prefix in ACTIONS.values())
            raise ValueError(f"faults: {name!r} is unknown; known are {known}, each also as {narrowed}; {pushed}")
        if not _is_number(probability) or not 0 <= probability <= 1:
            raise ValueError(f"faults: {name}: {probability!r} is not a probability from 0 to 1")


def parse_faults(text: str) -> dict[str, float]:
    """Read faults as they are written on a command line: `reset=0.02,confirm.lost=0.1`.

    Args:
        text: Names and probabilities; empty for none.

    Raises:
        ValueError: A name is unknown, or a probability is not valid. The text says which.
    """
    faults: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, probability = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"faults: {part!r} has no probability; write {part}=0.1")
        try:
            faults[name] = float(probability)
        except ValueError:
            raise ValueError(f"faults: {name}: {probability!r} is not a probability from 0 to 1") from None
    _check_faults(faults)
    return faults


def faults_by_action(faults: Mapping[str, float]) -> dict[str, tuple[tuple[Fault, float], ...]]:
    """The faults of each action and of `PUSH`; a name with a prefix takes precedence over the name without one."""
    known = [*((action, prefix, FAULTS) for action, prefix in ACTIONS.items()), (PUSH, PUSH, PUSH_FAULTS)]
    return {
        action: tuple(
            (fault, probability)
            for fault in possible
            if (probability := faults.get(f"{prefix}.{fault}", faults.get(fault, 0.0))) > 0
        )
        for action, prefix, possible in known
    }
