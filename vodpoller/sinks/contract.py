"""What a sink promises to its worker, and the settings that every sink has."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field

from vodpoller.events.event import Event
from vodpoller.journal.contract import Portion, Position
from vodpoller.logs import Logger
from vodpoller.secret import HasSecrets
from vodpoller.sinks.formats import Format
from vodpoller.vod.credentials import Credentials


class SinkConfig(HasSecrets):
    """The keys that every sink has; the model of a sink type adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str = Field(description="The sink type: the name of an entry point.")
    format: Format = Field(
        default="callback",
        description="The format of an event's body: `callback` is the body of a normal callback, `cloudevents` is the"
        " same body inside a CloudEvent 1.0 (JSON).",
    )
    queue_max_events: Annotated[int, Field(ge=16, le=100_000)] = Field(
        default=1024,
        description="Maximum number of events that wait for the sink in memory; further events are stored immediately.",
    )
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5,
        description="Number of different events that must fail in a row before attempts stop until a probe succeeds.",
    )
    give_up_after_secs: Annotated[float, Field(gt=0)] = Field(
        default=604_800.0, description="Age at which a stored event becomes a dead letter."
    )

    def claims(self) -> frozenset[str]:
        """The resources that only one sink may hold. Two sinks with a claim in common are a configuration error.

        A file is named by "file:" and its real path. The journal claims its own files in the same way.
        """
        return frozenset()

    def shares(self) -> frozenset[str]:
        """Resources, named as in `claims`, that sinks may share but none may claim, such as a database in a file."""
        return frozenset()

    def place(self) -> str:
        """Where events go, as `check` shows it: a path, a program, or only the host of a URL that may hold a secret."""
        found = {name: getattr(self, name, None) for name in ("path", "url", "command")}
        match found:
            case {"path": str(path)}:
                return str(Path(path).absolute())
            case {"url": str(url)}:
                return urlsplit(url).netloc.rpartition("@")[2]
            case {"command": [str(program), *_]}:
                return program
            case _:
                return ""


class Doubt(str):
    """The result of a probe if events can be delivered but a setting is probably a mistake: `check` shows a warning."""

    __slots__ = ()


ConfigT = TypeVar("ConfigT", bound=SinkConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkContext:
    """What a sink gets from the program around it.

    Args:
        log: Destination of the sink's log lines; the sink's name is added to each of them. The first argument is the
            name of the log event, which begins with the sink's type: `log.warning("rows.locked", path=...)`.
        monotonic: The clock for waits and time limits, in seconds.
        wall: The clock for times that a person reads, in seconds since 1970.
        credentials: Returns Tencent Cloud's API key as it is at this moment. A sink calls it for each request, and
            never shows the key. It does not block, except that it waits for the first temporary key; it raises
            `NoKeyError` while a temporary key is missing. None if no key is configured.
        on_refused_token: A sink calls it with the token of a temporary key that Tencent Cloud has refused. It returns
            soon; a new key is then requested, or read from its files. None if the key is not temporary.
    """

    log: Logger
    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    credentials: Callable[[], Credentials] | None = None
    on_refused_token: Callable[[str], None] | None = None


class Sink(ABC, Generic[ConfigT]):
    """A destination of events. Leases, handles, retries and the ledger are the task of its worker.

    A new sink is one module with a subclass and its `Config`, and one line under the entry points
    "vodpoller.sinks". The constructor opens what the sink needs. It raises `ConfigError` for a problem that the
    operator must correct, and `TransientError` for one that may pass (a full disk).

    Args:
        name: Name of the sink.
        config: Its settings, validated.
        context: The log and the clocks.

    Attributes:
        Config: The model of its settings. (A `ClassVar` must not depend on a type variable, so it is not one here.)
        concurrency: Number of threads that call `deliver` at the same time.
        batch_events: Maximum number of events in one call.
        timeout_secs: The time limit that `deliver` gets, in seconds.
        max_per_minute: Maximum number of calls in any 60 s, which are then evenly spaced; None: no limit.
        needs_key: Whether the sink cannot work without the API key of `[credentials]`.
    """

    Config: type[ConfigT]
    concurrency: int = 1
    batch_events: int = 1
    timeout_secs: float = 10.0
    max_per_minute: int | None = None
    needs_key: bool = False

    def __init__(self, name: str, config: ConfigT, context: SinkContext) -> None:
        self.name = name
        self.config = config
        self.context = context

    @classmethod
    def probe(cls, name: str, config: ConfigT, context: SinkContext) -> str:
        """Check whether events could be delivered, without constructing a sink: the daemon may be running.

        It delivers nothing, writes nothing and creates no file or folder.

        Args:
            name: Name of the sink.
            config: Its settings, validated.
            context: As for the constructor.

        Returns:
            One line that says what was found; a `Doubt` if the operator should look at it.

        Raises:
            ConfigError: Events cannot be delivered. The text says what is wrong and what to do, as at construction.
        """
        return "nothing to reach"

    def examine(self, event: Event) -> None:
        """Check an event before it is queued for `deliver`, without sending anything.

        An error raised here never counts for the breaker, since the receiver was not called.

        Args:
            event: The event.

        Raises:
            SkippedError: Nothing is to be sent for the event; it counts as delivered.
            RejectedError: The event can never be sent.
        """

    @abstractmethod
    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Deliver events. Returning means that all of them are accepted and would survive a loss of power.

        Args:
            events: One to `batch_events` events.
            timeout_secs: Time limit of the call, in seconds. The sink itself must keep to it.

        Raises:
            RejectedError: No event was accepted and none ever will be.
            TransientError: No event was accepted; a later call may succeed. Any unknown exception means the same.
            PartialFailureError: Some events were not accepted; it holds an error of the kinds above for each of them.
        """

    def reopen(self) -> None:
        """Open files and read secrets again, at a reload. Called from another thread than `deliver`."""

    def close(self) -> None:
        """Release all resources. This is the last call; after a reload another sink may need them in this process."""


@runtime_checkable
class Recoverable(Protocol):
    """Further methods of a sink that can find its events again after a crash: it holds each event exactly once.

    A crash may come after a sink has accepted an event and before the ledger has the entry. Without these methods, the
    event is then delivered again.
    """

    def position(self) -> Position:
        """The end of the sink's file after the last accepted call."""

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[Portion]:
        """Find the events that were accepted after the mark and never reached the ledger.

        It is called once, before the first `deliver`. A torn line is cut off.

        Args:
            mark: The position that the ledger knows; None if it knows none.
            sub_app_ids: The SubAppIds whose events may be in the file. A key depends on its SubAppId, which a line does
                not hold.

        Returns:
            What lies after the mark, in portions. Each can be stored before the next one is read: a process that ends
            in between continues from the position of the last one. After all of them, `position` returns the end of
            the file.
        """
