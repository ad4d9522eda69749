"""Events as VOD would send them: the bodies of generated ones, and those that a file holds."""

import json
import re
from collections.abc import Mapping
from random import Random
from typing import Any, Final

# The members that the documented sample of a callback shows as null beside the one with the payload.
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


def _unheard_of() -> str:
    payload = {
        "TaskId": "251000800-HologramRender-%(task)st0",
        "FileId": "%(file)s",
        "Status": 2,
        "Layers": [{"Depth": depth, "Url": f"{_HOST}/layer{depth}.holo"} for depth in range(4)],
    }
    return _template("HologramRenderComplete", "HologramRenderCompleteTask", payload)


class EventGenerator:
    """Bodies as VOD would send them, of several types, mostly `CreateSnapshotByTimeOffsetComplete`.

    A body depends on nothing but its number, its birth and the seed, so it need not be stored. In snapshot events the
    first `Url` ends with `?born=` and the moment of birth, in Unix seconds: latencies can be told from what arrives.

    Args:
        seed: Runs with different seeds have no id in common.
    """

    def __init__(self, seed: int) -> None:
        random = Random(seed)  # noqa: S311 - ids, not secrets
        # An odd factor permutes the integers of that width, so no id comes twice.
        self._task = (random.getrandbits(128), random.getrandbits(128) | 1)
        self._file = (random.getrandbits(63), random.getrandbits(63) | 1)
        well, other = _snapshots(10), _snapshots(20)
        self._templates = (
            *(
                well,
                _uploaded(),
                well,
                _snapshots(10, failed=True),
                well,
                _procedure(),
                other,
                well,
                _unheard_of(),
                well,
            ),
            *(other, _deleted(), well, well, _transcoded(), well, _procedure(), well, other, well),
        )

    def body(self, number: int, born: float) -> bytes:
        """The event's body, without a handle.

        Args:
            number: Which event.
            born: When it was born, in Unix seconds.
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
    """The body with more members in front of its own; one that is not an object stays as it is.

    Args:
        body: A callback's.
        members: JSON, as they stand in an object.
    """
    if not body.startswith(b"{"):
        return body
    gap = b"" if _NO_MEMBERS.match(body) else b","
    return b"{" + members + gap + body[1:]


def lines_of(text: bytes) -> list[bytes]:
    """The bodies in a text that has one per line. Lines without text are skipped."""
    return [line for line in text.split(b"\n") if line.strip()]
