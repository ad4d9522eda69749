"""The event types that Tencent documents, and the search for the type that a mistyped pattern means.

The set is open: VOD adds types every few months, so a type that is not here is unusual but never invalid.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable
from typing import Final

OTHER: Final = "other"

# From the description of `EventContent` (Tencent Cloud's API document "Data structures", product/266/31773), as of
# tencentcloud-sdk-python-vod 3.1.194: its `EventType`, and the types that its other members name.
DOCUMENTED_EVENT_TYPES: Final = frozenset(
    {
        "AigcHunyuan3DTaskComplete",
        "AigcImageTaskComplete",
        "AigcVideoTaskComplete",
        "ClipComplete",
        "ComplexAdaptiveDynamicStreamingComplete",
        "ComposeMediaComplete",
        "ConcatComplete",
        "CreateAigcAdvancedCustomElementComplete",
        "CreateAigcAdvancedCustomElementCompleteEvent",
        "CreateAigcCustomVoiceComplete",
        "CreateAigcCustomVoiceCompleteEvent",
        "CreateImageSpriteComplete",
        "CreateSnapshotByTimeOffsetComplete",
        "DescribeAigcFaceInfoAsyncComplete",
        "DescribeFileAttributesComplete",
        "EditMediaComplete",
        "ExtractBlindWatermarkComplete",
        "ExtractCopyRightWatermarkComplete",
        "ExtractTraceWatermarkComplete",
        "FastClipMediaComplete",  # from earlier versions of the document
        "FileDeleted",
        "MediaCastStatusChanged",
        "NewFileUpload",
        "PersistenceComplete",
        "ProcedureStateChanged",
        # For this type, and for the others that end in "Event", the document gives the name of the payload's member.
        # All other types are named without "Event", so both names count as documented.
        "ProcessImageAsyncComplete",
        "ProcessImageAsyncCompleteEvent",
        "ProcessMediaByMPSComplete",
        "PullComplete",
        "QualityEnhanceComplete",
        "QualityInspectComplete",
        "RebuildMediaComplete",
        "ReduceMediaBitrateComplete",
        "RemoveWatermark",
        "RestoreMediaComplete",
        "ReviewAudioVideoComplete",
        "SceneAigcImageComplete",
        "SceneAigcImageCompleteEvent",
        "SplitMediaComplete",
        "TranscodeComplete",
        "WechatMiniProgramPublishComplete",
        "WechatPublishComplete",
    }
)

_LONGEST: Final = 128  # the time of a comparison grows with the product of the lengths
_SHORTEST_PART: Final = 4
_SIMILAR: Final = 0.7  # of 1, by difflib's measure
_NOT_ALPHANUMERIC: Final = re.compile("[^a-z0-9]+")
_ENDINGS: Final = re.compile(r"(completed?|finish(ed)?|done)?(events?)?$")  # nearly all types have one


def documented_or_other(event_type: str) -> str:
    """The type if Tencent documents it, else "other": a closed set for the labels of metrics."""
    return event_type if event_type in DOCUMENTED_EVENT_TYPES else OTHER


def matches_documented(glob: str) -> bool:
    """Whether a pattern matches a documented type.

    Args:
        glob: A pattern of a route's `event_types`.
    """
    return any(fnmatch.fnmatchcase(name, glob) for name in DOCUMENTED_EVENT_TYPES)


def nearest_documented(glob: str) -> str | None:
    """The documented type that a pattern probably means; None if no type is similar.

    Args:
        glob: A pattern that matches no documented type: with wrong case, without the beginning or the end, or mistyped.
    """
    near = [(similarity, name) for name in DOCUMENTED_EVENT_TYPES if (similarity := _similarity(glob, name))]
    return max(near)[1] if near else None


def meant_for(event_type: str, globs: Iterable[str]) -> str | None:
    """The pattern that was probably meant to match a type but does not match it; None if there is none.

    Args:
        event_type: The received type.
        globs: The patterns of the routes that do not match it. A pattern that matches a documented type counts as
            correct, unless the received type is not documented.
    """
    is_documented = event_type in DOCUMENTED_EVENT_TYPES
    near = [
        (similarity, glob)
        for glob in globs
        if (similarity := _similarity(glob, event_type)) and not (is_documented and matches_documented(glob))
    ]
    return max(near)[1] if near else None


def _similarity(glob: str, name: str) -> float:
    """The similarity of a pattern and a type, 0 to 1; 0 if it is too low to mention the pattern."""
    if max(len(glob), len(name)) > _LONGEST:
        return 0.0
    letters = _NOT_ALPHANUMERIC.sub("", glob.lower())
    if letters == name.lower():
        return 1.0
    part, whole = _ENDINGS.sub("", letters), _ENDINGS.sub("", name.lower())
    ratio = difflib.SequenceMatcher(None, part, whole).ratio()
    is_part = len(part) >= _SHORTEST_PART and part in whole
    return ratio if is_part or ratio >= _SIMILAR else 0.0
