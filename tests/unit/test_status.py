import json
from dataclasses import replace

import pytest

from vodpoller.status import (
    CredentialsStatus,
    JournalStatus,
    SilentStatus,
    SinkStatus,
    SourceStatus,
    Status,
    StoredStatus,
)

NOW = 1_800_000_000.0
WELL = Status(
    pid=7,
    version="1",
    started_at=NOW - 1000,
    at=NOW,
    settled_events=5,
    sources=[SourceStatus(name="main", last_pull_at=NOW - 3, pulls_in_flight=1)],
    sinks=[SinkStatus(name="hook", queued=2)],
    stored=[StoredStatus(sink="hook", state="pending", events=3, oldest_at=NOW - 60)],
    journal=JournalStatus(path="/j.db", writable=True, limit_bytes=100),
)


def key(**more):
    return CredentialsStatus(provider="cvm_role", role="role r of this machine", **more)


def source(**more):
    return [SourceStatus(name="main", **more)]


def test_a_healthy_daemon_has_no_problems():
    assert WELL.problems() == []
    assert WELL.as_json()["problems"] == []
    assert WELL.as_line() == "main: pulling; 3 pending; 5 events settled"


def test_a_callback_source_without_callbacks_is_not_a_problem():
    status = replace(WELL, sources=[SourceStatus(name="pushed", type="callback")], at=NOW + 10**6)
    assert status.problems() == []
    assert status.as_line().startswith("pushed: receiving; ")


@pytest.mark.parametrize(
    ("changed", "what", "words"),
    [
        (
            {"journal": JournalStatus(path="/j.db", writable=False, error="database or disk is full")},
            "journal",
            ["database or disk is full", "room on the disk of /j.db"],
        ),
        (
            {"journal": JournalStatus(path="/j.db", writable=False, error="max_bytes are taken", remedy="Purge some")},
            "journal",
            ["max_bytes are taken. Purge some"],
        ),
        (
            {
                "started_at": NOW - 0.5,
                "sources": source(failing_since=NOW - 0.4, error="connection refused", request_id="r-1"),
            },
            "source main",
            ["since the start", "connection refused", "r-1", "api.endpoint"],
        ),
        (
            {"sources": source(failing_since=NOW - 70, last_pull_at=NOW - 75, error="bad key", remedy="Copy it anew")},
            "source main",
            ["bad key", "Copy it anew"],
        ),
        (
            {"started_at": NOW - 11, "sources": source(pulls_in_flight=1)},
            "source main",
            ["since the start", "no answer has come yet"],
        ),
        (
            {"credentials": key(failing_since=NOW - 60, expires_at=NOW + 900, error="it hangs", remedy="Bind a role")},
            "credentials",
            ["since 2027-01-15T07:59:00Z", "ends at 2027-01-15T08:15:00Z", "it hangs. Bind a role"],
        ),
        (
            {"credentials": key(failing_since=NOW - 1, expires_at=NOW + 59, error="it hangs")},
            "credentials",
            ["it hangs", "`vodpoller check --connect` tries provider = cvm_role"],
        ),
        (
            {"credentials": key(failing_since=NOW - 1, error="it hangs", is_usable=False)},
            "credentials",
            ["no key was issued yet: it hangs"],
        ),
        (
            {"sinks": [SinkStatus(name="hook", down_since=NOW - 90, next_try_at=NOW + 9, error="HTTP 503")]},
            "sink hook",
            ["down since 2027-01-15T07:58:30Z", "HTTP 503", "tried next at 2027-01-15T08:00:09Z", "receiver back"],
        ),
        (
            {"stored": [StoredStatus(sink="gone", state="pending", events=9, oldest_at=NOW)]},
            "sink gone",
            ["9 stored events", "no such sink", "purge --pending --sink gone", "--to SINK"],
        ),
    ],
)
def test_each_problem_names_cause_and_remedy(changed, what, words):
    first, *_ = replace(WELL, **changed).problems()
    assert first.what == what
    assert all(word in str(first) for word in words), str(first)


def test_a_source_whose_events_are_pushed_is_a_problem():
    status = replace(WELL, sources=[replace(WELL.sources[0], is_pushed=True)])
    (problem,) = status.problems()
    assert problem.what == "source main"
    assert problem.cause.startswith("reliable callbacks are off for this application")
    assert "check --connect" in problem.remedy


@pytest.mark.parametrize(
    "changed",
    [
        {"started_at": NOW - 9, "sources": source()},
        {"sources": source(last_pull_at=NOW - 59)},
        {"sources": source(last_pull_at=NOW - 3, failing_since=NOW - 2, error="one pull failed")},
        {"credentials": key(failing_since=NOW - 59, expires_at=NOW + 900, error="it hangs")},
        {"credentials": key(expires_at=NOW + 5)},
        {"sinks": [SinkStatus(name="hook", paused_until=NOW + 60, next_try_at=NOW + 60, error="HTTP 429")]},
        {"stored": [StoredStatus(sink="hook", state="dead", events=9, oldest_at=NOW)]},
        {"stored": [StoredStatus(sink="gone", state="dead", events=9, oldest_at=NOW)]},
    ],
)
def test_a_state_that_may_end_by_itself_is_not_a_problem(changed):
    assert replace(WELL, **changed).problems() == []


@pytest.mark.parametrize(("sink", "what"), [("hook", "sink hook"), ("", "dead letters")])
def test_dead_letters_are_a_problem_only_with_strict(sink, what):
    status = replace(WELL, stored=[StoredStatus(sink=sink, state="dead", events=9, oldest_at=NOW)])
    (problem,) = status.problems(strict=True)
    assert problem.what == what
    assert "deadletters list" in problem.remedy
    assert status.as_json(strict=True)["problems"]


def test_a_problem_that_causes_others_comes_first():
    status = replace(
        WELL,
        journal=JournalStatus(path="/j.db", writable=False),
        sources=source(),
        sinks=[SinkStatus(name="hook", down_since=NOW)],
    )
    assert [problem.what for problem in status.problems()] == ["journal", "source main", "sink hook"]


def test_the_json_has_every_part_and_readable_times():
    found = WELL.as_json()
    wanted = "running pid version started_at sources sinks stored journal credentials reload problems"
    assert not set(wanted.split(" ")) - set(found)
    assert found["running"] is True
    assert found["sources"][0]["last_pull_at"] == "2027-01-15T07:59:57Z"
    assert found["sources"][0]["failing_since"] is None
    assert found["stored"][0] == {
        "sink": "hook",
        "state": "pending",
        "events": 3,
        "oldest_at": "2027-01-15T07:59:00Z",
    }
    json.dumps(found)


def test_the_line_names_problems_and_the_number_of_stored_events():
    status = replace(
        WELL,
        sources=source(error="connection refused"),
        sinks=[SinkStatus(name="a", down_since=NOW), SinkStatus(name="b", down_since=NOW)],
        stored=[*WELL.stored, StoredStatus(sink="", state="dead", events=4, oldest_at=NOW)],
        journal=JournalStatus(path="/j.db", writable=False),
    )
    assert status.as_line() == (
        "main: cannot pull: connection refused; sinks down: a, b; the journal cannot be written; 3 pending; 4 dead;"
        " 5 events settled"
    )


def test_the_line_names_the_remedy_for_a_source():
    status = replace(WELL, sources=source(error="AuthFailure", remedy="compare the key"))
    assert status.as_line().startswith("main: cannot pull: AuthFailure | compare the key; ")


@pytest.mark.parametrize(
    ("strict", "problems"), [(False, ["daemon", "sink gone"]), (True, ["daemon", "sink gone", "sink hook"])]
)
def test_a_missing_daemon_is_the_first_problem(strict, problems):
    status = SilentStatus(
        running=False,
        cause="no daemon runs",
        remedy="Start it",
        version="1",
        started_at=NOW - 9,
        last_pull_at=None,
        last_confirm_at=NOW - 3,
        at=NOW,
        sinks=["hook"],
        stored=[
            StoredStatus(sink="gone", state="pending", events=9, oldest_at=NOW),
            StoredStatus(sink="hook", state="dead", events=1, oldest_at=NOW),
        ],
        path="/j.db",
        limit_bytes=100,
    )
    found = status.as_json(strict=strict)
    assert [problem["what"] for problem in found["problems"]] == problems
    assert found["problems"][0] == {"what": "daemon", "cause": "no daemon runs", "remedy": "Start it"}
    assert not set(WELL.as_json()) - set(found)
    assert set(found["journal"]) == set(WELL.as_json()["journal"])
    assert (found["running"], found["pid"], found["last_pull_at"]) == (False, None, None)
    assert found["journal"]["last_confirm_at"] == "2027-01-15T07:59:57Z"
