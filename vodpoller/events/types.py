"""The event types that Tencent documents, and which of them a mistyped pattern means.

The set is open: VOD adds types every few months, so a type that is not here is unusual and never wrong.
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
        "FastClipMediaComplete",  # of earlier versions of the document
        "FileDeleted",
        "MediaCastStatusChanged",
        "NewFileUpload",
        "PersistenceComplete",
        "ProcedureStateChanged",
        # The document gives this type, and the others that end in "Event", the name of their member. All other types
        # are named without it, so both are taken for documented.
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

_LONGEST: Final = 128  # comparing takes time that grows with the product of the lengths
_SHORTEST_PART: Final = 4
_SIMILAR: Final = 0.7  # of 1, by difflib's measure
_NO_LETTER: Final = re.compile("[^a-z0-9]+")
_ENDINGS: Final = re.compile(r"(completed?|finish(ed)?|done)?(events?)?$")  # nearly all have them: they say nothing


def documented_or_other(event_type: str) -> str:
    """The type if Tencent documents it, else "other": one of a closed set, for the labels of metrics."""
    return event_type if event_type in DOCUMENTED_EVENT_TYPES else OTHER


def matches_documented(glob: str) -> bool:
    """Whether a pattern takes a documented type.

    Args:
        glob: As in a route's `event_types`.
    """
    return any(fnmatch.fnmatchcase(name, glob) for name in DOCUMENTED_EVENT_TYPES)


def nearest_documented(glob: str) -> str | None:
    """The documented type that a pattern probably means, None where none is near.

    Args:
        glob: One that takes no documented type: of another case, without the beginning or the end, or mistyped.
    """
    near = [(likeness, name) for name in DOCUMENTED_EVENT_TYPES if (likeness := _likeness(glob, name))]
    return max(near)[1] if near else None


def meant_for(event_type: str, globs: Iterable[str]) -> str | None:
    """The pattern that was probably meant to take a type that it does not take, None where none was.

    Args:
        event_type: As it came.
        globs: The patterns of the routes that do not take it. One that takes a documented type is right as it is,
            unless the type that came is one that is not documented.
    """
    is_documented = event_type in DOCUMENTED_EVENT_TYPES
    near = [
        (likeness, glob)
        for glob in globs
        if (likeness := _likeness(glob, event_type)) and not (is_documented and matches_documented(glob))
    ]
    return max(near)[1] if near else None


def _likeness(glob: str, name: str) -> float:
    """How like a pattern is to a type, 0 to 1; 0 where it is not to be mentioned."""
    if max(len(glob), len(name)) > _LONGEST:
        return 0.0
    letters = _NO_LETTER.sub("", glob.lower())
    if letters == name.lower():
        return 1.0
    part, whole = _ENDINGS.sub("", letters), _ENDINGS.sub("", name.lower())
    ratio = difflib.SequenceMatcher(None, part, whole).ratio()
    is_part = len(part) >= _SHORTEST_PART and part in whole
    return ratio if is_part or ratio >= _SIMILAR else 0.0
