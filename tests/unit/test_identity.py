from math import inf

import pytest

from tests.helpers import event
from vodpoller.events.identity import Occurrence, Occurrences, has_own_id

LEASE_SECS = 30.0
SOURCE = "main"


@pytest.mark.parametrize(
    "content",
    [
        {"EventType": "TranscodeComplete", "TranscodeCompleteEvent": {"TaskId": "1-Transcode-2"}},
        {"EventType": "Unknown", "FirstEvent": {"FileId": "1"}, "SecondEvent": {"TaskId": "2"}},
        {"EventType": "WechatPublishComplete", "TaskId": 12, "WechatPublishComplete": {"Status": "FINISH"}},
        {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": "387702"}},
        {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": 3877020000000000001}},
    ],
)
def test_content_that_names_its_task_or_its_upload_has_an_id(content):
    assert has_own_id(content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["1"], "FileDeleteResultInfo": []}},
        {"EventType": "MediaCastStatusChanged", "MediaCastStatusChangedEvent": {"CastId": "1", "Status": "Idle"}},
        {"EventType": "RestoreMediaComplete", "RestoreMediaCompleteEvent": {"FileId": "1"}},
        {"EventType": "PersistenceComplete", "PersistenceCompleteEvent": {"FileId": "1"}},
        {"EventType": "ProcessImageAsyncComplete", "ProcessImageAsyncCompleteEvent": {"EncodeConfig": {}}},
        {"EventType": "TranscodeComplete", "TranscodeCompleteEvent": {"TaskId": "", "FileId": "1"}},
        {"EventType": "TranscodeComplete", "TranscodeCompleteEvent": {"TaskId": None}},
        {"EventType": "TranscodeComplete", "TranscodeCompleteEvent": {"TaskId": 0}},
        {"EventType": "TranscodeComplete", "TranscodeCompleteEvent": {"TaskId": True}},
        {"EventType": "Unknown", "UnknownEvent": {"Input": {"TaskId": "of another"}}},
        {"EventType": "Unknown", "UnknownEvent": [{"TaskId": "of another"}]},
        {"EventType": "NewFileUpload", "FileUploadEvent": {"ProcedureTaskId": "of another"}},
        {"EventType": "NewFileUpload", "FileUploadEvent": None},
    ],
)
def test_all_other_content_has_no_id(content):
    assert not has_own_id(content)


class Scene:
    """Occurrences and VOD's answers; all times are seconds of a monotonic clock that starts at 0."""

    def __init__(self):
        self.occurrences = Occurrences(0.0)

    def bring(self, number, *, sent, answered=None, contents=b"c", source=SOURCE, lease_secs=LEASE_SECS):
        """An answer with this number of events of equal content; returns their keys."""
        found, _ = self.occurrences.identify(
            [contents] * number,
            source=source,
            sent_at=sent,
            answered_at=sent + 1 if answered is None else answered,
            lease_secs=lease_secs,
        )
        return [occurrence.key for occurrence in found]

    def empty(self, *, sent, answered=None, source=SOURCE):
        return self.occurrences.answered_empty(
            source, sent_at=sent, answered_at=sent + 1 if answered is None else answered, lease_secs=LEASE_SECS
        )

    def lose(self, *, sent, lost, source=SOURCE):
        self.occurrences.answer_lost(source, sent_at=sent, lost_at=lost)


@pytest.fixture
def scene():
    return Scene()


def test_each_equal_event_of_one_answer_is_its_own_occurrence(scene):
    assert len(set(scene.bring(16, sent=100))) == 16


@pytest.mark.parametrize("answered", [102, 129.9])
def test_equal_content_within_the_lease_is_another_occurrence(scene, answered):
    assert scene.bring(1, sent=100) != scene.bring(1, sent=101, answered=answered)


@pytest.mark.parametrize("sent", [100.5, 131, 500])
def test_equal_content_after_the_lease_is_the_old_occurrence(scene, sent):
    old = scene.bring(1, sent=100)
    assert scene.bring(1, sent=sent, answered=max(sent, 130)) == old


def test_each_arrival_renews_the_lease(scene):
    old = scene.bring(1, sent=100)
    assert scene.bring(1, sent=131) == old
    assert scene.bring(1, sent=140, answered=160.9) != old
    assert scene.bring(1, sent=160, answered=161) == old


def test_the_oldest_are_taken_first_and_further_events_are_new(scene):
    first = scene.bring(1, sent=100)
    second = scene.bring(1, sent=101)
    found = scene.bring(3, sent=140)
    assert found[:2] == [*first, *second]
    assert len(set(found)) == 3


def test_the_occurrence_whose_lease_ended_first_is_taken(scene):
    first, second = scene.bring(1, sent=100), scene.bring(1, sent=101)
    assert scene.bring(1, sent=130, answered=131) == first
    assert scene.bring(1, sent=165) == second, "an empty answer could prove it gone while the first is still to come"


def test_an_acknowledged_occurrence_never_comes_again(scene):
    old = scene.bring(2, sent=100)
    assert scene.occurrences.forget([old[0], b"unknown"]) == [old[0]]
    assert scene.bring(1, sent=140) == [old[1]]
    scene.occurrences.forget(old)
    assert not set(scene.bring(2, sent=180)) & set(old)


def test_other_content_is_never_the_same(scene):
    assert scene.bring(1, sent=100) != scene.bring(1, sent=140, contents=b"d")


def test_an_answer_slower_than_a_lease_holds_each_occurrence_once(scene):
    assert len(set(scene.bring(2, sent=100, answered=103, lease_secs=2.0))) == 2


# --- what an empty answer proves --------------------------------------------------------------------------------------


def test_after_an_empty_answer_equal_content_is_new(scene):
    old = scene.bring(1, sent=100, answered=101)
    scene.empty(sent=131)
    assert scene.bring(1, sent=132) != old


@pytest.mark.parametrize("sent", [90, 110, 130, 130.9])
def test_a_pull_sent_before_the_lease_surely_ended_proves_nothing(scene, sent):
    old = scene.bring(1, sent=100, answered=101)
    scene.empty(sent=sent, answered=132)
    assert scene.bring(1, sent=132) == old


def test_either_of_two_overlapping_pulls_may_have_got_the_event(scene):
    old = scene.bring(1, sent=100, answered=101)
    scene.empty(sent=132, answered=137)
    assert scene.bring(1, sent=136.9, answered=137.5) == old


def test_an_empty_answer_of_another_source_proves_nothing(scene):
    old = scene.bring(1, sent=100)
    scene.empty(sent=140, source="other")
    assert scene.bring(1, sent=142) == old


@pytest.mark.parametrize(("sent", "proves"), [(34.9, False), (35.0, True)])
def test_an_empty_answer_soon_after_the_start_proves_nothing(scene, sent, proves):
    scene.occurrences.add(
        Occurrence(key=b"old", content_key=b"c", source=SOURCE, lease_ends_at=-5.0, leased_until=-inf)
    )
    scene.empty(sent=sent)
    assert (scene.bring(1, sent=40) != [b"old"]) is proves


@pytest.mark.parametrize(("lost", "sent", "proves"), [(150, 179.9, False), (150, 180.0, True), (141, 174.9, False)])
def test_an_empty_answer_soon_after_a_lost_one_proves_nothing(scene, lost, sent, proves):
    """VOD may go on holding a pull whose connection broke, until its 5 s are over, and hand out events to it."""
    old = scene.bring(1, sent=100, answered=101)
    scene.lose(sent=140, lost=lost)
    scene.empty(sent=sent)
    assert (scene.bring(1, sent=190) != old) is proves


def test_an_empty_answer_that_overlaps_a_lost_one_proves_nothing(scene):
    old = scene.bring(1, sent=100, answered=101)
    scene.empty(sent=141, answered=146)
    scene.lose(sent=140, lost=150)
    assert scene.bring(1, sent=171) == old


def test_an_empty_answer_before_a_lost_one_keeps_its_proof(scene):
    old = scene.bring(1, sent=100, answered=101)
    scene.empty(sent=135, answered=139)
    scene.lose(sent=140, lost=150)
    assert scene.bring(1, sent=171) != old


def test_a_proof_is_final_when_no_pull_of_its_time_is_outstanding(scene):
    old = scene.bring(1, sent=100, answered=101)
    assert scene.empty(sent=131, answered=136) == []
    assert scene.empty(sent=160, answered=165) == []
    assert scene.empty(sent=161, answered=166) == old
    assert len(scene.occurrences) == 0


def test_an_occurrence_from_before_the_start_returns_after_its_lease(scene):
    """It is taken 2 s early, since the wall clock may be behind."""
    scene.occurrences.add(Occurrence(key=b"old", content_key=b"c", source="x", lease_ends_at=12.0, leased_until=-inf))
    assert scene.bring(1, sent=5, answered=9.9) != [b"old"]
    assert scene.bring(1, sent=6, answered=10.0) == [b"old"]


def test_a_lease_from_before_the_start_that_is_too_long_is_over(scene):
    """The lease's end is known by the wall clock, which may have been set back."""
    scene.occurrences.add(Occurrence(key=b"old", content_key=b"c", source="x", lease_ends_at=1e9, leased_until=-inf))
    assert scene.bring(1, sent=0, answered=0.1) == [b"old"]


def test_keys_are_made_of_content_and_random_bytes():
    drawn = Occurrences(0.0, draw=lambda number: b"x" * number)
    content_key = event().key
    (one,), (new,) = drawn.identify([content_key], source="s", sent_at=0.0, answered_at=0.0, lease_secs=1.0)
    assert new is one
    assert len(one.key) == 32
    assert one.key != content_key


# --- callbacks --------------------------------------------------------------------------------------------------------


def received(scene, *, began, whole=None):
    """Receive a callback, always with the same content; return its key."""
    found, _ = scene.occurrences.identify(
        [b"c"],
        source=SOURCE,
        sent_at=began,
        answered_at=began if whole is None else whole,
        lease_secs=4.0,
        tries_secs=60.0,
    )
    return found[0].key


def test_a_callback_that_comes_while_an_equal_one_is_held_is_another(scene):
    assert received(scene, began=100) != received(scene, began=103)


def test_a_callback_that_was_not_answered_comes_again_as_the_same(scene):
    keys = {received(scene, began=at) for at in (100, 105, 110)}
    assert len(keys) == 1


def test_each_try_restarts_the_minute(scene):
    assert received(scene, began=100) == received(scene, began=159) == received(scene, began=218)


def test_a_minute_after_its_last_try_equal_content_is_another(scene):
    assert received(scene, began=100) != received(scene, began=160)


def test_equal_content_after_an_answered_callback_is_another(scene):
    first = received(scene, began=100)
    scene.occurrences.forget([first])
    assert received(scene, began=105) != first


def test_a_callback_from_before_the_start_may_come_for_a_minute():
    for at, is_same in ((30, True), (61, False)):
        scene = Scene()
        scene.occurrences.add(
            Occurrence(key=b"k", content_key=b"c", source=SOURCE, lease_ends_at=0.0, leased_until=-inf)
        )
        assert (received(scene, began=at) == b"k") is is_same, at


def test_a_clock_that_was_set_back_does_not_prolong_the_minute():
    scene = Scene()
    scene.occurrences.add(
        Occurrence(key=b"k", content_key=b"c", source=SOURCE, lease_ends_at=3600.0, leased_until=-inf)
    )
    assert received(scene, began=61) != b"k"
