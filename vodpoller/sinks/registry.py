"""The sink types that are installed: entry points, which packages of others have as well."""

from importlib.metadata import EntryPoint, entry_points
from typing import Final

ENTRY_POINT_GROUP: Final = "vodpoller.sinks"


def available_sinks() -> dict[str, EntryPoint]:
    """The sink types that are installed, by name; none of them is loaded by asking."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
