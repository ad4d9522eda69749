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
    """The keys that every sink has; a sink's own model adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str = Field(description="Which sink this is: the name of an entry point.")
    format: Format = Field(
        default="callback",
        description="The body of an event: `callback` is that of a normal callback, `cloudevents` is the same inside a"
        " CloudEvent 1.0 (JSON).",
    )
    queue_max_events: Annotated[int, Field(ge=16, le=100_000)] = Field(
        default=1024,
        description="Maximum number of events that wait for the sink in memory; more are stored at once.",
    )
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="Number of distinct events in a row whose failure stops attempts until a probe succeeds."
    )
    give_up_after_secs: Annotated[float, Field(gt=0)] = Field(
        default=604_800.0, description="Age at which a stored event becomes a dead letter."
    )

    def claims(self) -> frozenset[str]:
        """What only one sink may hold: two sinks with a claim in common are an error.

        A file is "file:" and its real path; the journal claims its own in the same way.
        """
        return frozenset()

    def shares(self) -> frozenset[str]:
        """As `claims`, what other sinks may share in the same way, but nothing may claim: a database in a file."""
        return frozenset()

    def place(self) -> str:
        """Where events go, as `check` shows it: a path, a program, or the host of a URL, whose rest may be a secret."""
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
    """What a probe returns if events get there, and something is probably not meant so: `check` shows a warning."""

    __slots__ = ()


ConfigT = TypeVar("ConfigT", bound=SinkConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkContext:
    """What a sink gets from the program around it.

    Args:
        log: Destination of its log lines, each of which names the sink by itself. The first argument is the name of
            what happened, which begins with the sink's type: `log.warning("rows.locked", path=...)`.
        monotonic: The clock of waits and time limits, in seconds.
        wall: The clock of what a person reads, in seconds since 1970.
        credentials: Gives Tencent Cloud's API key as it is at this moment, to be asked for each request and never
            shown; None if there is none. It does not block, and raises `NoKeyError` while there is no temporary key.
        on_refused_token: Told the token of a temporary key that Tencent Cloud refuses, and soon returns: another key is
            asked for, or looked for in its files. None if there is no such key.
    """

    log: Logger
    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    credentials: Callable[[], Credentials] | None = None
    on_refused_token: Callable[[str], None] | None = None


class Sink(ABC, Generic[ConfigT]):
    """Where events go. A sink knows nothing of leases, handles, retries or the ledger: its worker does.

    A new sink is one module with a subclass and its `Config`, and one line under the entry points
    "vodpoller.sinks". What it needs is opened by its constructor: a `ConfigError` says what the operator must mend, a
    `TransientError` what may pass (a full disk).

    Args:
        name: Of the sink.
        config: Its settings, validated.
        context: The log and the clocks.

    Attributes:
        Config: The model of its settings. (A `ClassVar` must not depend on a type variable, so it is not one here.)
        concurrency: Number of threads that call `deliver` at the same time.
        batch_events: Maximum number of events in one call.
        timeout_secs: The time limit that `deliver` gets, in seconds.
        max_per_minute: Maximum number of calls in any 60 s, which are then evenly spaced; None: no limit.
        needs_key: Whether it cannot do without the key of `[credentials]`.
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
        """Look whether events could get there, without a sink being made: the daemon may be running.

        It delivers nothing, writes nothing and makes no file or folder.

        Args:
            name: Of the sink.
            config: Its settings, validated.
            context: As for the constructor.

        Returns:
            One line that says what is there; a `Doubt` if the operator is to look at it.

        Raises:
            ConfigError: It cannot be reached; says what is wrong and what to do, as at construction.
        """
        return "nothing to reach"

    def examine(self, event: Event) -> None:
        """Look at an event before it is queued for `deliver`, without sending anything.

        What this raises never counts for the breaker and costs no call: the receiver is not asked.

        Args:
            event: The event.

        Raises:
            SkippedError: Nothing is to be sent for it: it counts as delivered.
            RejectedError: It can never be sent.
        """

    @abstractmethod
    def deliver(self, events: Sequence[Event], timeout_secs: float) -> None:
        """Take events. Returning means: all of them are accepted, and would survive a loss of power.

        Args:
            events: One to `batch_events` events.
            timeout_secs: Time limit of the call, in seconds; it is the sink's duty to keep to it.

        Raises:
            RejectedError: No event was accepted and none ever will be.
            TransientError: No event was accepted; a later call may succeed. Any unknown exception means the same.
            PartialFailureError: Some events were not accepted, each with an error of these kinds.
        """

    def reopen(self) -> None:
        """A reload: open files again, read secrets again. Called from another thread than `deliver`."""

    def close(self) -> None:
        """The last call. What the sink holds is free then: after a reload another one may need it in this process."""


@runtime_checkable
class Recoverable(Protocol):
    """What a sink has besides if it can say after a crash what it holds: then each event is in it exactly once.

    A crash may come between a sink's accepting and the ledger's entry. Without this, the event is delivered again.
    """

    def position(self) -> Position:
        """Where the sink's file ends after the last accepted call."""

    def recover(self, mark: Position | None, sub_app_ids: Collection[int | None]) -> Iterable[Portion]:
        """Called once before the first `deliver`: what was accepted beyond the mark and never reached the ledger.

        Args:
            mark: The position that the ledger knows; None if it knows none.
            sub_app_ids: The SubAppIds whose events may be in the file: a key depends on it, a line does not hold it.

        Returns:
            What lies beyond the mark, in portions that can each be written down before the next is taken: a process
            that ends in between goes on from the position of the last one. After them, `position` says where the file
            ends. A torn line is cut off.
        """
