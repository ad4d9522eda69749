import inspect
import re

import pytest
from tencentcloud.vod.v20180717.models import EventContent

from vodpoller.events.types import DOCUMENTED_EVENT_TYPES, matches_documented, meant_for, nearest_documented


def test_every_type_that_the_installed_sdk_documents_is_known():
    text = inspect.getsource(EventContent.__init__)
    listed = set(re.findall(r"<li>(\w+)\N{FULLWIDTH COLON}", text))
    named = set(re.findall(r"(?:事件类型为?|EventType 为) ?(\w+)", text, re.ASCII))

    assert len(listed) > 20
    assert len(named) > 20
    assert listed | named <= DOCUMENTED_EVENT_TYPES


@pytest.mark.parametrize(
    ("glob", "name"),
    [
        ("CreateSnapshotByTimeOffsetCompleted", "CreateSnapshotByTimeOffsetComplete"),
        ("createsnapshotbytimeoffsetcomplete", "CreateSnapshotByTimeOffsetComplete"),
        ("SnapshotByTimeOffsetCompleteEvent", "CreateSnapshotByTimeOffsetComplete"),  # the member's name
        ("Snapshot*", "CreateSnapshotByTimeOffsetComplete"),
        ("create_snapshot_by_time_offset_complete", "CreateSnapshotByTimeOffsetComplete"),
        ("FileUploadEvent", "NewFileUpload"),
        ("FileDeleteEvent", "FileDeleted"),
        ("ProcedureStateChange", "ProcedureStateChanged"),
        ("TranscodeFinished", "TranscodeComplete"),
        ("ImageSpriteComplete", "CreateImageSpriteComplete"),
        ("HologramRenderComplete", None),
        ("A", None),
        ("*Completed", None),
        ("*" * 200, None),
    ],
)
def test_a_pattern_that_is_nearly_right_means_the_nearest_type(glob, name):
    assert nearest_documented(glob) == name
    assert not matches_documented(glob) or set(glob) == {"*"}


@pytest.mark.parametrize("glob", ["NewFileUpload", "*Complete", "Create*", "*", "File[A-Z]*", "?ullComplete"])
def test_a_pattern_that_takes_a_documented_type_is_known(glob):
    assert matches_documented(glob)


@pytest.mark.parametrize(
    ("event_type", "globs", "meant"),
    [
        ("CreateSnapshotByTimeOffsetComplete", ["CreateSnapshotByTimeOffsetCompleted"], True),
        ("NewFileUpload", ["FileDeleted", "FileUpload*"], True),
        ("ProcessImageComplete", ["ProcessImageAsyncComplete"], True),  # not documented, nearly the pattern
        ("QualityEnhanceComplete", ["QualityInspectComplete"], False),  # both are documented
        ("HologramRenderComplete", ["CreateSnapshotByTimeOffsetCompleted"], False),
        ("x" * 1_000_000, ["x" * 100], False),
        ("", ["A"], False),
    ],
)
def test_the_pattern_meant_for_a_type_that_is_not_taken_is_found(event_type, globs, meant):
    assert meant_for(event_type, globs) == (globs[-1] if meant else None)
