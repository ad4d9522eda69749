"""The sink types that are installed: entry points, of vodpoller and of other packages."""

from importlib.metadata import EntryPoint, entry_points
from typing import Final

ENTRY_POINT_GROUP: Final = "vodpoller.sinks"


def available_sinks() -> dict[str, EntryPoint]:
    """The sink types that are installed, by name. None of them is loaded."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
