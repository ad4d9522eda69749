"""Events without an id of their own: across all faults each is in both files once, under one id.

The events of the types in `BODIES` have neither a task id nor an upload, so two of them can be equal to the byte. Each
test feeds some of every type to a daemon with three sinks: a file of bodies, a file of CloudEvents, and a webhook. At
the end the number of lines of each type equals the number of its events, the CloudEvents have different ids, and the
receiver got each event with the id of its CloudEvent in `webhook-id`. Only events that were in flight to the receiver
when the process was killed may arrive there twice, with the same id.

The types do not affect each other: one run tests all of them.
"""

import json
import time
from collections import Counter

import pytest

from tests.polling import until
from tests.processes import canonical
from tests.receiver import Answer

LEASE_SECS = 2.0
VOD_HOLDS_SECS = 5.0  # maximum time that VOD holds a pull, also one whose connection broke

# Members as in `EventContent` and its parts ("Data structures", product/266/31773), without those that are null.
BODIES = {
    event_type: json.dumps({"EventType": event_type, member: payload})
    for event_type, member, payload in (
        (
            "FileDeleted",
            "FileDeleteEvent",
            {
                "FileIdSet": ["5285890784273533167"],
                "FileDeleteResultInfo": [
                    {"FileId": "5285890784273533167", "DeleteParts": [{"Type": "TranscodeFiles", "Definition": 0}]}
                ],
            },
        ),
        ("MediaCastStatusChanged", "MediaCastStatusChangedEvent", {"CastId": "cast-7", "Status": "Working"}),
        (
            "RestoreMediaComplete",
            "RestoreMediaCompleteEvent",
            {
                "FileId": "5285890784273533167",
                "OriginalStorageClass": "ARCHIVE",
                "TargetStorageClass": "ARCHIVE",
                "RestoreTier": "Expedited",
                "RestoreDay": 7,
                "Status": 0,
                "Message": "",
            },
        ),
        (
            "PersistenceComplete",
            "PersistenceCompleteEvent",
            {"FileId": "5285890784273533167", "PersistenceSource": "SimpleHlsClip"},
        ),
        (
            "ProcessImageAsyncComplete",
            "ProcessImageAsyncCompleteEvent",
            {"EncodeConfig": {"Format": "JPEG", "Quality": 80}, "AiCutOutConfig": None},
        ),
        ("HologramFaded", "HologramFadedTask", {"HologramId": "h-7", "FileId": "5285890784273533167"}),  # unknown
    )
}
TYPES = len(BODIES)


def set_up(system, receiver, *, lease_secs=LEASE_SECS, source='unrouted = "dead_letter"', **options):
    """Start the simulator with these options, and configure a daemon with three sinks for it."""
    simulator = system.simulator(**({"visibility_secs": lease_secs, "poll_secs": 0.5} | options))
    cloud = f'[sinks.cloud]\ntype = "file"\npath = "{cloud_path(system)}"\nformat = "cloudevents"\n'
    hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\nconcurrency = 16\ntimeout_secs = 20\n'
    sinks = system.archive_sink + cloud + hook
    system.configure(simulator.url, lease_secs=lease_secs, source=source, sinks=sinks)
    return simulator


def cloud_path(system):
    return system.folder / "cloud.jsonl"


def feed(simulator, number=1):
    """Feed a number of equal events of each type: one of each type, then one of each again, and so on."""
    simulator.feed(*list(BODIES.values()) * number)


def await_settled(daemon, number, **fields):
    """Wait for the log lines of `number` settled events of each type; returns the lines."""
    return daemon.await_log(
        "event.settled", number=number * TYPES, where=lambda line: fields.items() <= line.items(), secs=30
    )


def recovered_lines(daemon, sink):
    """The numbers of lines that a daemon found beyond the mark of a sink's file."""
    return [line["keys"] for line in daemon.log("file.recovered") if line["sink"] == sink]


def await_moment(moment):
    until(lambda: time.monotonic() >= moment)


def end(system, simulator, receiver, daemon, number, *, calls_per_event=1):
    """Wait until all is done, stop the daemon, and check the files and the receiver for each event.

    Args:
        system: Has the files.
        simulator: All its events must be confirmed.
        receiver: The webhook's receiver.
        daemon: The running daemon.
        number: Number of events of each type.
        calls_per_event: Maximum number of requests to the receiver for one event.
    """
    wanted = number * TYPES

    def is_done():
        ids = {received.headers["webhook-id"] for received in list(receiver.accepted)}
        numbers = len(system.lines()), len(system.lines(cloud_path(system))), len(ids)
        return simulator.all_confirmed() and min(numbers) >= wanted

    until(is_done, secs=30, what=daemon.tail)
    assert daemon.terminate()[0] == 0
    assert simulator.stats()["fed"] == wanted
    assert not daemon.log("puller.failed")

    of_each_type = {canonical(body): number for body in BODIES.values()}
    assert Counter(map(canonical, system.lines())) == of_each_type
    events = [json.loads(line) for line in system.lines(cloud_path(system))]
    assert Counter(canonical(json.dumps(event["data"])) for event in events) == of_each_type
    ids = Counter(event["id"] for event in events)
    assert set(ids.values()) == {1}
    calls = Counter((received.headers["webhook-id"], canonical(received.body)) for received in receiver.received)
    assert calls.keys() == {(event["id"], canonical(json.dumps(event["data"]))) for event in events}
    assert max(calls.values()) <= calls_per_event


# --- equal events without redelivery ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3])
def test_equal_events_of_one_answer_are_separate_events(system, receiver, number):
    # 18 are more than an answer holds: the last ones come in another answer.
    simulator = set_up(system, receiver, lease_secs=5)
    feed(simulator, number)
    daemon = system.daemon()

    end(system, simulator, receiver, daemon, number)
    answers = Counter((line["pull_request_id"], line["event_type"]) for line in daemon.log("event.settled"))
    assert max(answers.values()) == number


def test_an_equal_event_within_the_lease_of_another_is_separate(system, receiver):
    simulator = set_up(system, receiver, lease_secs=15)
    receiver.answer = Answer(after_secs=20)  # or when it is released
    daemon = system.daemon()
    feed(simulator)
    until(lambda: len(receiver.received) == TYPES, what=daemon.tail)
    feed(simulator)
    until(lambda: len(receiver.received) == 2 * TYPES, what=daemon.tail)
    assert simulator.stats()["confirmed"] == 0
    receiver.released.set()

    end(system, simulator, receiver, daemon, 2)
    assert simulator.stats()["redeliveries"] == 0


def test_an_equal_event_after_the_acknowledged_confirm_is_separate(system, receiver):
    # The hanging pull brings the events: only the acknowledgement shows that VOD no longer has the first ones.
    simulator = set_up(system, receiver, poll_secs=9)
    daemon = system.daemon()
    feed(simulator)
    await_settled(daemon, 1, confirmed=True)
    feed(simulator)  # within the lease of the first ones
    await_settled(daemon, 2, confirmed=True)
    await_moment(time.monotonic() + LEASE_SECS)
    assert simulator.stats()["pulls_empty"] == 0
    simulator.control(poll_secs=0.5)
    feed(simulator)

    end(system, simulator, receiver, daemon, 3)


@pytest.mark.parametrize("signal_of_the_end", ["kill", "terminate"])
def test_an_equal_event_after_confirm_and_restart_is_separate(system, receiver, signal_of_the_end):
    simulator = set_up(system, receiver)
    daemon = system.daemon()
    feed(simulator)
    await_settled(daemon, 1, confirmed=True)
    getattr(daemon, signal_of_the_end)()
    await_moment(time.monotonic() + LEASE_SECS)  # during the lease it would be separate anyway
    feed(simulator)

    end(system, simulator, receiver, system.daemon(), 2)


# --- redelivered events -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_ones", [0, 1])
def test_a_redelivery_after_a_refused_confirm_is_the_same_event(system, receiver, equal_ones):
    simulator = set_up(system, receiver, forget_confirms=TYPES)
    daemon = system.daemon()
    feed(simulator)
    await_settled(daemon, 1, confirm_result="refused")
    feed(simulator, equal_ones)  # before the leases of the first ones end

    end(system, simulator, receiver, daemon, 1 + equal_ones)
    assert simulator.stats()["confirms_forgotten"] == TYPES
    assert simulator.stats()["redeliveries"] >= TYPES


@pytest.mark.parametrize("equal_ones", [0, 1])
def test_repeated_redeliveries_without_confirms_are_the_same_event(system, receiver, equal_ones):
    simulator = set_up(system, receiver, deny="ConfirmEvents")
    daemon = system.daemon()
    feed(simulator)
    until(lambda: len(system.lines()) == TYPES, what=daemon.tail)
    feed(simulator, equal_ones)
    until(lambda: simulator.stats()["redeliveries"] >= 2 * TYPES * (1 + equal_ones), what=daemon.tail)
    simulator.control(deny=[])

    end(system, simulator, receiver, daemon, 1 + equal_ones)


KILLS = (
    # Lines that must be in the two files at the kill (None: any number), and maximum requests per event to the
    # receiver: two only if the process dies between the receiver's answer and the ledger row.
    ("identify:before:1", (0, 0), 1),
    ("identify:after:1", (0, 0), 1),
    ("write:before:1:events.jsonl", (0, None), 2),
    ("write:after:1:events.jsonl", (TYPES, None), 2),
    ("write:before:1:cloud.jsonl", (None, 0), 2),
    ("write:after:1:cloud.jsonl", (None, TYPES), 2),
    ("sync:before:2:events.jsonl", (TYPES, None), 2),  # the first one is at the start
    ("sync:after:2:cloud.jsonl", (None, TYPES), 2),
    ("ledger:before:1:hook", (None, None), 2),
    ("ledger:after:1:archive", (TYPES, None), 2),
    ("confirm:before:1", (TYPES, TYPES), 1),
)


@pytest.mark.long
@pytest.mark.parametrize(("failpoint", "lines", "calls_per_event"), KILLS, ids=[failpoint for failpoint, *_ in KILLS])
def test_after_a_kill_a_redelivery_is_the_same_an_equal_event_is_not(
    system, receiver, failpoint, lines, calls_per_event
):
    simulator = set_up(system, receiver)
    feed(simulator)
    system.daemon(started=False, failpoint=failpoint).await_failpoint()
    in_files = len(system.lines()), len(system.lines(cloud_path(system)))
    assert all(wanted in (None, found) for wanted, found in zip(lines, in_files, strict=True)), in_files
    feed(simulator)  # before VOD delivers the first ones again

    end(system, simulator, receiver, system.daemon(), 2, calls_per_event=calls_per_event)


def test_after_a_kill_and_an_empty_pull_an_equal_event_is_separate(system, receiver):
    # VOD has confirmed the first ones, and the journal does not know it. An equal event may be taken for one of them
    # until a pull is empty that was sent a lease after VOD dropped the pulls of the killed process: this is not
    # promised.
    simulator = set_up(system, receiver)
    feed(simulator)
    system.daemon(started=False, failpoint="confirm:after:1").await_failpoint()
    assert simulator.all_confirmed()
    assert len(system.lines()) == len(system.lines(cloud_path(system))) == len(receiver.accepted) == TYPES
    daemon = system.daemon()
    await_moment(time.monotonic() + VOD_HOLDS_SECS + LEASE_SECS)
    empty = simulator.stats()["pulls_empty"]
    until(lambda: simulator.stats()["pulls_empty"] >= empty + 2)  # the first of them may have been sent before
    feed(simulator)

    end(system, simulator, receiver, daemon, 2)


# --- lines that are not in the journal --------------------------------------------------------------------------------


UNKNOWN_LINES = (
    ("write:amid:1:events.jsonl", "archive", TYPES - 1),  # half of twelve lines, the sixth without its end
    ("write:amid:1:cloud.jsonl", "cloud", TYPES - 1),
    ("ledger:before:1:archive", "archive", 2 * TYPES),
    ("ledger:before:1:cloud", "cloud", 2 * TYPES),
)


@pytest.mark.parametrize(
    ("failpoint", "sink", "whole_lines"), UNKNOWN_LINES, ids=[failpoint for failpoint, *_ in UNKNOWN_LINES]
)
def test_lines_of_equal_events_before_a_kill_are_not_written_again(system, receiver, failpoint, sink, whole_lines):
    simulator = set_up(system, receiver)
    feed(simulator, 2)
    system.daemon(started=False, failpoint=failpoint).await_failpoint()
    assert len(system.lines(cloud_path(system) if sink == "cloud" else system.archive)) == whole_lines
    daemon = system.daemon()
    assert recovered_lines(daemon, sink) == [whole_lines]

    end(system, simulator, receiver, daemon, 2, calls_per_event=2)


def test_after_a_kill_the_second_of_two_equal_events_gets_its_line(system, receiver):
    # One puller: the second answer of six is not pulled before the lines of the first are in the ledger.
    simulator = set_up(system, receiver, source='unrouted = "dead_letter"\nmax_concurrent_pulls = 1')
    feed(simulator, 2)
    system.daemon(started=False, failpoint="identify:after:1").await_failpoint()
    simulator.control(batch=TYPES)
    system.daemon(started=False, failpoint="ledger:before:1:archive").await_failpoint()
    assert len(system.lines()) == TYPES
    daemon = system.daemon()
    assert recovered_lines(daemon, "archive") == [TYPES]

    end(system, simulator, receiver, daemon, 2, calls_per_event=2)
