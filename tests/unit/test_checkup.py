"""What `check --connect` reports about credentials, the API and sinks."""

import json
import re
from pathlib import Path

import pytest

from tests.receiver import raw_server, read_request
from vodpoller.checkup.checks import check_connections
from vodpoller.checkup.finding import Finding, Level, worst_first
from vodpoller.config.load import from_dict
from vodpoller.errors import TransientError
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator
from vodpoller.sinks import Doubt
from vodpoller.sinks.file.sink import FileSink

REFUSED = b'{"Response":{"Error":{"Code":"UnauthorizedOperation","Message":"no"}%b}}'


def answers(body, *headers):
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers]

    def serve(connection, stopping):
        while read_request(connection):
            connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)

    return serve


ALL = {"name": "all"}


KEY = {"secret_id": "AKIDexample", "secret_key": "the-secret-key"}


def findings_at(
    url, tmp_path, log, *, credentials=KEY, routes=(ALL,), sources=({"name": "main", "unrouted": "confirm"},)
):
    config = from_dict(
        {
            "api": {"endpoint": url, "timeout_secs": 5},
            "credentials": credentials,
            "sources": list(sources),
            "routes": [{"sinks": ["archive"], **route} for route in routes],
            "sinks": {"archive": {"type": "file", "path": str(tmp_path / "events.jsonl")}},
            "journal": {"path": str(tmp_path / "journal.db")},
        },
        where="test",
        base=Path(),
        env={},
    )
    return list(check_connections(config, log))


def found_at(url, tmp_path, log, **changes):
    return {finding.what: finding for finding in findings_at(url, tmp_path, log, **changes)}


@pytest.fixture
def vod():
    with Simulator(SimulatorOptions(requests_per_sec=0, poll_secs=0.0)) as simulator:
        yield simulator


def test_a_role_without_a_key_is_a_problem_and_vod_gets_no_request(vod, tmp_path, log):
    credentials = {"provider": "cvm_role", "role": "other", "metadata_endpoint": vod.url}
    vod.control(credential_secs=60)
    found = found_at(vod.url, tmp_path, log, credentials=credentials)
    assert found["credentials"].level is Level.PROBLEM
    assert "does not know a role other" in found["credentials"].text
    assert "correct credentials.role" in found["credentials"].remedy
    assert "source main" not in found
    assert vod.stats()["requests"] == {}


@pytest.mark.parametrize(
    ("changed", "role"),
    [
        ({"provider": "cvm_role", "metadata_endpoint": "URL"}, "role simulated-role of this machine"),
        (
            {"provider": "assume_role", "sts_endpoint": "URL", "role_arn": "qcs::cam::uin/1:roleName/r"} | KEY,
            "role qcs",
        ),
    ],
)
def test_the_role_and_the_expiry_of_its_key_are_shown(vod, tmp_path, log, changed, role):
    vod.control(credential_secs=60)
    credentials = {name: vod.url if value == "URL" else value for name, value in changed.items()}
    found = found_at(vod.url, tmp_path, log, credentials=credentials)
    assert found["credentials"].level is Level.GOOD
    assert found["credentials"].text.startswith(role)
    assert re.search(r"a key until 20\d\d-\d\d-\d\dT", found["credentials"].text)
    assert found["source main"].level is Level.GOOD


@pytest.mark.parametrize(
    ("member", "text"),
    [(b"", "was refused"), (b',"RequestId":""', "was refused"), (b',"RequestId":"r-1"', "(RequestId r-1)")],
)
def test_a_request_id_is_shown_if_there_is_one(tmp_path, log, member, text):
    with raw_server(answers(REFUSED % member)) as url:
        found = found_at(url, tmp_path, log)["source main"]
    assert found.level is Level.PROBLEM
    assert found.remedy == "in CAM, grant vod:PullEvents and vod:ConfirmEvents to the owner of the key"
    assert text in found.text
    assert ("RequestId" in found.text) == ("r-1" in found.text)


@pytest.mark.parametrize("headers", [[], [b"Date: yesterday"], [b"Date: Fri, 31 Dec 99999999999 23:59:59 GMT"]])
def test_an_answer_without_a_date_differs_from_no_answer(tmp_path, log, headers):
    with raw_server(answers(REFUSED % b"", *headers)) as url:
        clock = found_at(url, tmp_path, log)["clock"]
    assert clock.level is Level.WARNING
    assert clock.text.startswith("not compared: the answer has no Date that can be read")


def test_an_unreachable_endpoint_is_shown_by_host_and_port_only(tmp_path, log):
    found = found_at("http://127.0.0.1:1", tmp_path, log)
    assert "127.0.0.1:1 refused the connection" in found["source main"].text
    assert "_Connection" not in found["source main"].text
    assert "RequestId" not in found["source main"].text
    assert found["clock"].text == "not compared: VOD did not answer"


def test_an_unreachable_endpoint_gets_one_request(tmp_path, log):
    found = found_at("http://127.0.0.1:1", tmp_path, log)
    assert not {"callback of main", "queue of main"} & {*found}


# --- the settings of the application at VOD ---------------------------------------------------------------------------


def callback_findings(found):
    return [(finding.level, finding.text, finding.remedy) for finding in found if finding.what == "callback of main"]


def test_normal_callbacks_are_a_problem_with_a_remedy(tmp_path, log, vod):
    vod.control(mode="PUSH", events_off=["NewFileUpload"])
    found = findings_at(vod.url, tmp_path, log)
    ((level, text, remedy),) = callback_findings(found)
    assert level is Level.PROBLEM
    assert text.startswith("reliable callbacks are off for this application: VOD sends its events by normal callbacks")
    assert remedy.startswith("VOD console, Callback settings: choose the reliable callback.")
    assert [finding.what for finding in found if finding.level is Level.PROBLEM] == ["callback of main"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret-1@app.example/secret-2?secret-3=1", " to app.example:443 "),
        ("http://[::1", " events by normal"),
        ("nonsense", " events by normal"),
    ],
)
def test_only_the_host_of_a_receivers_address_is_shown(tmp_path, log, url, shown):
    answer = {"Response": {"Mode": "PUSH", "NotificationUrl": url, "RequestId": "r-1"}}
    with raw_server(answers(json.dumps(answer).encode())) as vod_url:
        ((_, text, _),) = callback_findings(findings_at(vod_url, tmp_path, log))
    assert shown in text
    assert "secret" not in text


@pytest.mark.parametrize("mode", ["PIPE", None, 7])
def test_an_unknown_mode_is_not_a_problem(tmp_path, log, mode):
    answer = {"Response": {"Mode": mode, "CountOfEventsToPull": 0, "RequestId": "r-1"}}
    with raw_server(answers(json.dumps(answer).encode())) as url:
        (level, text, _), *_ = callback_findings(findings_at(url, tmp_path, log))
    assert level is Level.INFORMATION
    assert text.startswith("VOD reports an unknown mode of callbacks")


def test_a_switch_that_is_off_is_a_warning_if_a_route_names_the_type(tmp_path, log, vod):
    vod.control(events_off=["FileDeleted", "PersistenceComplete"])
    routes = (
        {"name": "gone", "event_types": ["FileDel*"]},
        {"name": "too", "event_types": ["FileDeleted"], "where": "x"},
    )
    on, off = callback_findings(findings_at(vod.url, tmp_path, log, routes=routes))[:2]
    assert on[:2] == (Level.GOOD, "reliable callbacks are on")
    assert off[0] is Level.WARNING
    assert off[1].startswith("FileDeleted is switched off, ")
    assert "gone, too" in off[1]


@pytest.mark.parametrize("event_types", [None, ["*"]])
def test_a_switch_that_is_off_is_a_note_if_a_route_takes_everything(tmp_path, log, vod, event_types):
    vod.control(events_off=["FileDeleted"])
    route = ALL if event_types is None else {**ALL, "event_types": event_types}
    _, off, unseen = callback_findings(findings_at(vod.url, tmp_path, log, routes=[route]))
    assert off[:2] == (Level.INFORMATION, "FileDeleted is switched off: no event of this type comes")
    assert unseen[1].endswith("console only: all types but NewFileUpload, FileDeleted, PersistenceComplete")


def test_a_switch_of_a_type_that_no_route_takes_is_not_shown(tmp_path, log, vod):
    vod.control(events_off=["FileDeleted"])
    sources = ({"name": "main", "unrouted": "confirm"}, {"name": "second", "sub_app_id": 2, "unrouted": "confirm"})
    routes = (
        {"name": "uploads", "event_types": ["NewFileUpload"]},
        {"name": "other", "event_types": ["FileDeleted"], "sources": ["second"]},
    )
    found = findings_at(vod.url, tmp_path, log, routes=routes, sources=sources)
    assert [level for level, *_ in callback_findings(found)] == [Level.GOOD]
    assert [finding.what for finding in found if finding.level is Level.WARNING] == ["callback of second"]


def test_types_that_only_the_console_shows_are_listed(tmp_path, log, vod):
    routes = (
        {"name": "snapshots", "event_types": ["CreateSnapshot*", "NewFileUpload"]},
        {"name": "again", "event_types": ["CreateSnapshot*", "PullComplete"]},
    )
    _, unseen = callback_findings(findings_at(vod.url, tmp_path, log, routes=routes))
    assert unseen[0] is Level.INFORMATION
    assert unseen[1].endswith("in its console only: CreateSnapshot*, PullComplete")


@pytest.mark.parametrize(
    ("action", "what"), [("DescribeEventConfig", "callback of main"), ("DescribeEventsState", "queue of main")]
)
def test_a_missing_permission_is_a_note_that_names_it(tmp_path, log, vod, action, what):
    vod.control(deny=[action])
    found = findings_at(vod.url, tmp_path, log)
    (finding,) = [finding for finding in found if finding.what == what]
    assert finding.level is Level.INFORMATION
    assert f"vod:{action}" in finding.remedy
    assert Level.PROBLEM not in {finding.level for finding in found}


def test_without_permission_to_confirm_the_other_checks_still_run(tmp_path, log, vod):
    vod.control(deny=["ConfirmEvents"], mode="PUSH")
    found = findings_at(vod.url, tmp_path, log)
    assert [finding.what for finding in found if finding.level is Level.PROBLEM] == ["source main", "callback of main"]


@pytest.mark.parametrize("fault", ["internal_error", "reset"])
def test_a_request_that_fails_is_a_warning(tmp_path, log, vod, fault):
    vod.control(faults={f"config.{fault}": 1, f"state.{fault}": 1})
    found = findings_at(vod.url, tmp_path, log)
    levels = {finding.what: finding.level for finding in found}
    assert levels["callback of main"] is levels["queue of main"] is Level.WARNING
    assert levels["source main"] is Level.GOOD


@pytest.mark.parametrize(("events", "level"), [(0, Level.GOOD), (1234, Level.INFORMATION)])
def test_waiting_events_are_counted_and_never_a_problem(tmp_path, log, vod, events, level):
    vod.feed(["{}"] * events)
    queue = found_at(vod.url, tmp_path, log)["queue of main"]
    assert queue.level is level
    assert queue.text.startswith("1,234 events wait at VOD" if events else "no event waits at VOD")


def test_the_worst_finding_is_the_first():
    levels = [Level.GOOD, Level.WARNING, Level.PROBLEM, Level.INFORMATION, Level.PROBLEM, Level.GOOD]
    found = [Finding(what=str(number), level=level, text="") for number, level in enumerate(levels)]
    assert [finding.what for finding in worst_first(found)] == ["2", "4", "1", "3", "0", "5"]


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_a_doubt_of_a_probe_is_a_warning(tmp_path, log, vod, monkeypatch):
    monkeypatch.setattr(FileSink, "probe", lambda *_: Doubt("a loss of power may lose lines"))
    found = found_at(vod.url, tmp_path, log)
    assert (found["sink archive"].level, found["sink archive"].text) == (
        Level.WARNING,
        "a loss of power may lose lines",
    )


def test_a_probe_with_a_transient_error_hides_no_other_finding(tmp_path, log, vod, monkeypatch):
    def probe(*_arguments):
        raise TransientError("the disk is full")

    monkeypatch.setattr(FileSink, "probe", probe)
    found = found_at(vod.url, tmp_path, log)
    assert (found["sink archive"].level, found["sink archive"].text) == (Level.PROBLEM, "the disk is full")
    assert found["journal"].level is Level.GOOD
