"""Sinks: the destinations of events. The names below are all that the author of a sink needs, stable from 1.0 on.

Everything else in vodpoller is internal. Each sink that comes with vodpoller is a file or a folder here; `README.md`
beside this file shows how to write a sink.
"""

from vodpoller.errors import ConfigError, PartialFailureError, RejectedError, SkippedError, TransientError
from vodpoller.events.event import Event
from vodpoller.events.snapshots import Snapshot, SnapshotsTaken, file_id_of, snapshots_of, task_id_of
from vodpoller.journal.contract import Portion, Position
from vodpoller.secret import Secret
from vodpoller.sinks.contract import Doubt, Recoverable, Sink, SinkConfig, SinkContext
from vodpoller.sinks.formats import Format, content_type, encode
from vodpoller.sinks.registry import available_sinks

__all__ = [
    "ConfigError",
    "Doubt",
    "Event",
    "Format",
    "PartialFailureError",
    "Portion",
    "Position",
    "Recoverable",
    "RejectedError",
    "Secret",
    "Sink",
    "SinkConfig",
    "SinkContext",
    "SkippedError",
    "Snapshot",
    "SnapshotsTaken",
    "TransientError",
    "available_sinks",
    "content_type",
    "encode",
    "file_id_of",
    "snapshots_of",
    "task_id_of",
]
