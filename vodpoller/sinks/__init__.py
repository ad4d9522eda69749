"""Sinks: where events go. What is named here is all that the author of a sink needs, stable from 1.0 on.

Everything else in vodpoller is internal. The sinks that come with it are a file or a folder each; `README.md` beside
this file shows how to write one.
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
