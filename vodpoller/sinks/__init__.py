"""The sinks, one file each, and what their configurations and bodies have in common."""

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vodpoller.events import Event
from vodpoller.secret import HasSecrets

ENTRY_POINT_GROUP = "vodpoller.sinks"

Format = Literal["callback"]


class SinkConfig(HasSecrets):
    """The keys that every sink has; a sink's own model adds to them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: str = Field(description="Which sink this is: the name of an entry point.")
    format: Format = Field(
        default="callback", description="The body of an event: `callback` is that of a normal callback."
    )
    queue_max_events: Annotated[int, Field(ge=16, le=100_000)] = Field(
        default=1024,
        description="How many events may wait for the sink in memory; more are stored at once.",
    )
    breaker_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="So many distinct events failing in a row stop attempts until a probe succeeds."
    )
    give_up_after_secs: Annotated[float, Field(gt=0)] = Field(
        default=604_800.0, description="How old a stored event gets before it becomes a dead letter."
    )

    def claims(self) -> frozenset[str]:
        """What only one sink may hold: two sinks with a claim in common are an error.

        A file is "file:" and its real path; the journal claims its own in the same way.
        """
        return frozenset()


def available_sinks() -> dict[str, EntryPoint]:
    """The sink types that are installed, by name; none of them is loaded by asking."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def encode(event: Event, body_format: Format) -> bytes:
    """The event as a sink hands it on.

    Args:
        event: Any event.
        body_format: As configured.
    """
    match body_format:
        case "callback":
            return event.body
