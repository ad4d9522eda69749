"""The sink types that are installed: packages name them under the entry points `vodpoller.sinks`."""

from importlib.metadata import EntryPoint
from typing import Any

from vodpoller.config.wording import quoted
from vodpoller.sinks.contract import Sink, SinkConfig


class UnusableSinkError(Exception):
    """An installed sink type cannot be used; the message says why."""


def load_sink_class(point: EntryPoint) -> type[Sink[Any]]:
    """Import the class of a sink type.

    Args:
        point: The entry point.

    Raises:
        UnusableSinkError: It cannot be imported, or is not a sink.
    """
    try:
        sink_class = point.load()
    except Exception as error:  # an installed package may fail in any way
        raise UnusableSinkError(
            f"the sink type {quoted(point.name)} cannot be loaded: {type(error).__name__}: {error}"
            f" (install what {point.value} needs, or remove the sink)"
        ) from error
    config = getattr(sink_class, "Config", None)
    if not (isinstance(sink_class, type) and issubclass(sink_class, Sink)) or not (
        isinstance(config, type) and issubclass(config, SinkConfig)
    ):
        raise UnusableSinkError(
            f"the sink type {quoted(point.name)} is not a sink: {point.value} must be a vodpoller.sinks.Sink"
            " with a Config (ask the authors of the package)"
        )
    return sink_class


def config_of(sink_class: type[Sink[Any]]) -> type[SinkConfig]:
    """The model of a table of this sink type."""
    config: type[SinkConfig] = sink_class.Config
    return config
