"""Bodies of events: generated as VOD would send them, or read from a file."""

import json
import re
from collections.abc import Mapping
from random import Random
from typing import Any, Final

# The members that are null beside the payload in the documented sample of a callback.
_SIBLINGS: Final = (
    "FileUploadEvent",
    "ProcedureStateChangeEvent",
    "FileDeleteEvent",
    "PullCompleteEvent",
    "EditMediaComplete",
    "WechatPublishComplete",
    "TranscodeCompleteEvent",
    "ConcatCompleteEvent",
    "ClipCompleteEvent",
    "CreateImageSpriteCompleteEvent",
    "SnapshotByTimeOffsetCompleteEvent",
)
_NO_MEMBERS: Final = re.compile(rb"\{\s*\}")
_HOST: Final = "http://251000800.vod2.example.com/%(task)s"


def _template(event_type: str, member: str, payload: Mapping[str, Any], *, siblings: bool = True) -> str:
    others: dict[str, Any] = dict.fromkeys(_SIBLINGS) if siblings else {}
    others[member] = payload
    return json.dumps({"EventType": event_type, **others}, separators=(",", ":"))


def _snapshots(definition: int, *, failed: bool = False) -> str:
    images = [
        {"ErrCode": 0, "TimeOffset": 10_000, "Url": f"{_HOST}/1.png?born=%(born).6f"},
        {"ErrCode": 0, "TimeOffset": 20_000, "Url": f"{_HOST}/2.png"},
    ]
    if failed:
        images[1] |= {"ErrCode": 70_000, "Url": ""}
    return _template(
        "CreateSnapshotByTimeOffsetComplete",
        "SnapshotByTimeOffsetCompleteEvent",
        {
            "TaskId": "251000800-CreateSnapshotByTimeOffset-%(task)st0",
            "FileId": "%(file)s",
            "Definition": definition,
            "SnapshotInfoSet": images,
        },
    )


def _uploaded() -> str:
    basics = {
        "Name": "holiday",
        "Description": "",
        "CreateTime": "2026-01-05T08:30:00Z",
        "UpdateTime": "2026-01-05T08:30:02Z",
        "ExpireTime": "9999-12-31T23:59:59Z",
        "ClassId": 0,
        "ClassName": "Other",
        "ClassPath": "Other",
        "CoverUrl": "",
        "Type": "mp4",
        "MediaUrl": f"{_HOST}/source.mp4",
        "SourceInfo": {"SourceType": "ServerUpload", "SourceContext": "", "LiveRecordInfo": None},
        "StorageRegion": "ap-guangzhou",
        "TagSet": [],
        "Vid": "%(file)s",
        "Category": "Video",
        "Status": "Normal",
        "StorageClass": "STANDARD",
    }
    payload = {"FileId": "%(file)s", "MediaBasicInfo": basics, "ProcedureTaskId": "", "MetaData": None}
    return _template("NewFileUpload", "FileUploadEvent", payload, siblings=False)


def _procedure() -> str:
    transcoding = {
        "Status": "SUCCESS",
        "ErrCode": 0,
        "Message": "",
        "Input": {"Definition": 100_020},
        "Output": {"Url": f"{_HOST}/v.f100020.mp4", "Size": 4_189_073, "Container": "mov,mp4,m4a", "Height": 480},
    }
    payload = {
        "TaskId": "251000800-procedurev2-%(task)st0",
        "Status": "FINISH",
        "ErrCode": 0,
        "Message": "",
        "FileId": "%(file)s",
        "FileName": "holiday",
        "FileUrl": f"{_HOST}/source.mp4",
        "MetaData": {"AudioDuration": 60.1, "Bitrate": 1_021_028, "Container": "mov,mp4,m4a", "Duration": 60.0},
        "MediaProcessResultSet": [{"Type": "Transcode", "TranscodeTask": transcoding}],
        "TasksPriority": 0,
        "TasksNotifyMode": "",
        "SessionContext": "",
        "SessionId": "",
    }
    return _template("ProcedureStateChanged", "ProcedureStateChangeEvent", payload, siblings=False)


def _deleted() -> str:
    parts = [{"Type": kind, "Definition": 0} for kind in ("OriginalFiles", "TranscodeFiles", "SnapshotFiles")]
    payload = {
        "FileIdSet": ["%(file)s"],
        "FileDeleteResultInfo": [{"FileId": "%(file)s", "DeleteParts": parts}],
        "Operator": {"Kind": "ServerApi", "Request": "%(task)s"},
    }
    return _template("FileDeleted", "FileDeleteEvent", payload)


def _transcoded() -> str:
    payload = {
        "TaskId": "251000800-Transcode-%(task)st0",
        "ErrCode": 0,
        "Message": "",
        "FileId": "%(file)s",
        "FileName": "holiday",
        "Duration": 60,
        "CoverUrl": "",
        "PlayInfoSet": [{"Url": f"{_HOST}/f20.mp4", "Definition": 20, "Bitrate": 512_000, "Height": 360, "Width": 640}],
    }
    return _template("TranscodeComplete", "TranscodeCompleteEvent", payload)


def _unknown_type() -> str:
    payload = {
        "TaskId": "251000800-HologramRender-%(task)st0",
        "FileId": "%(file)s",
        "Status": 2,
        "Layers": [{"Depth": depth, "Url": f"{_HOST}/layer{depth}.holo"} for depth in range(4)],
    }
    return _template("HologramRenderComplete", "HologramRenderCompleteTask", payload)


class EventGenerator:
    """Generates bodies as VOD would send them, of several types, mostly `CreateSnapshotByTimeOffsetComplete`.

    A body depends only on its number, the time when it was added to the queue, and the seed, so it need not be stored.
    In snapshot events the first `Url` ends with `?born=` and this time, in Unix seconds, so that a receiver can
    measure the latency.

    Args:
        seed: Seed of all ids. Runs with different seeds have no id in common.
    """

    def __init__(self, seed: int) -> None:
        random = Random(seed)  # noqa: S311 - ids, not secrets
        # Multiplication by an odd factor permutes the integers of that width, so no id occurs twice.
        self._task = (random.getrandbits(128), random.getrandbits(128) | 1)
        self._file = (random.getrandbits(63), random.getrandbits(63) | 1)
        snapshots, other_snapshots = _snapshots(10), _snapshots(20)
        self._templates = (
            *(
                snapshots,
                _uploaded(),
                snapshots,
                _snapshots(10, failed=True),
                snapshots,
                _procedure(),
                other_snapshots,
                snapshots,
                _unknown_type(),
                snapshots,
            ),
            *(
                other_snapshots,
                _deleted(),
                snapshots,
                snapshots,
                _transcoded(),
                snapshots,
                _procedure(),
                snapshots,
                other_snapshots,
                snapshots,
            ),
        )

    def body(self, number: int, born: float) -> bytes:
        """The event's body, without a handle.

        Args:
            number: Number of the event.
            born: Unix time at which it was added to the queue, in seconds.
        """
        task_start, task_factor = self._task
        file_start, file_factor = self._file
        names = {
            "task": format((task_start + number * task_factor) % 2**128, "032x"),
            "file": 10**19 + (file_start + number * file_factor) % 2**63,
            "born": born,
        }
        return (self._templates[number % len(self._templates)] % names).encode()


def with_members(body: bytes, members: bytes) -> bytes:
    """Insert members before those of a body. A body that is not an object is returned unchanged.

    Args:
        body: The body of a callback.
        members: The JSON of the members, without braces.
    """
    if not body.startswith(b"{"):
        return body
    separator = b"" if _NO_MEMBERS.match(body) else b","
    return b"{" + members + separator + body[1:]


def lines_of(text: bytes) -> list[bytes]:
    """The bodies in a text with one body per line. Blank lines are skipped."""
    return [line for line in text.split(b"\n") if line.strip()]
