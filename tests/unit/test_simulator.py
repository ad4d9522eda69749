import concurrent.futures
import contextlib
import hashlib
import hmac
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tencentcloud.common.credential import Credential
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile
from tencentcloud.vod.v20180717 import models
from tencentcloud.vod.v20180717.vod_client import VodClient

import vodpoller
from tests.polling import until
from tests.processes import environment
from vodpoller.cli.app import main
from vodpoller.logs import CATALOGUE, make_logger
from vodpoller.simulator.api import SlidingSecond
from vodpoller.simulator.bodies import EventGenerator
from vodpoller.simulator.options import FAULTS, SimulatorOptions, parse_faults
from vodpoller.simulator.queue import EventQueue, ForgottenHandlesError, StaleHandlesError
from vodpoller.simulator.service import Simulator

SECRET_ID, SECRET_KEY = "AKIDsimulated", "a-key-of-no-worth"

pytestmark = [
    # The SDK calls a function that Python 3.12 deprecates, and does not know some members of the documented samples.
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fileds are useless:UserWarning"),
]


def start(stack, **options):
    defaults = {"poll_secs": 0.0, "requests_per_sec": 0, "seed": 7}
    return stack.enter_context(Simulator(SimulatorOptions(**(defaults | options))))


@pytest.fixture
def stack():
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def run(stack):
    return lambda **options: start(stack, **options)


class Client:
    """One keep-alive connection that sends unsigned requests."""

    def __init__(self, url):
        host, port = url.removeprefix("http://").split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=20)

    def request(self, method, path, body=b"", headers=None):
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def send(self, action, body=None, **headers):
        named = {"Content-Type": "application/json", "X-TC-Action": action, "X-TC-Version": "2018-07-17"}
        named |= {f"X-TC-{name}": value for name, value in headers.items()}
        kept = {name: value for name, value in named.items() if value is not None}
        return self.request("POST", "/", json.dumps({} if body is None else body), kept)

    def call(self, action, body=None, **headers):
        status, _, content = self.send(action, body, **headers)
        assert status == 200
        return json.loads(content)["Response"]

    def pull(self):
        return self.call("PullEvents").get("EventSet") or []

    def confirm(self, handles, **more):
        return self.call("ConfirmEvents", {"EventHandles": handles, **more})


@pytest.fixture
def client(stack):
    def connect(simulator):
        made = Client(simulator.url)
        stack.callback(made.connection.close)
        return made

    return connect


def code_of(answer):
    return answer.get("Error", {}).get("Code")


def handles_of(events):
    return [event["EventHandle"] for event in events]


def bodies(count):
    return [json.dumps({"EventType": "Numbered", "Numbered": {"N": number}}) for number in range(count)]


def conserved(stats):
    return stats["fed"] == stats["confirmed"] + stats["visible"] + stats["outstanding"]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rate": -1}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"poll_secs": "5"}, "poll_secs"),
        ({"visibility_secs": None}, "visibility_secs"),
        ({"events": 1.5}, "events"),
        ({"events": True}, "events"),
        ({"port": -1}, "port"),
        ({"clock_skew_secs": float("nan")}, "clock_skew_secs"),
        ({"batch": 0}, "batch"),
        ({"batch": 17}, "batch"),
        ({"secret_id": "a"}, "secret_key"),
        ({"secret_key": "a"}, "secret_id"),
        ({"secret_id": 1, "secret_key": "a"}, "secret_id"),
        ({"empty": "nothing"}, "empty"),
        ({"stale": "both"}, "stale"),
        ({"sub_app_id": "1"}, "sub_app_id"),
        ({"deny": ["ConfirmEvent"]}, "'ConfirmEvent' is not one of PullEvents, ConfirmEvents"),
        ({"mode": "pull"}, "mode: 'pull' is not one of PULL, PUSH"),
        ({"events_off": ["FileDelete"]}, "'FileDelete' is not one of NewFileUpload, FileDeleted, PersistenceComplete"),
        ({"deny": [["PullEvents"]]}, "deny: ['PullEvents']"),
        ({"deny": "PullEvents"}, "deny: 'PullEvents' is not a list"),
        ({"deny": None}, "deny: None is not a list"),
        ({"refuse_confirms_of": 5}, "refuse_confirms_of: 5 is not a list"),
        ({"refuse_confirms_of": ["5"]}, "refuse_confirms_of: '5' is not a whole number"),
        ({"feed": 10}, "feed"),
        ({"faults": "reset=1"}, "faults"),
        ({"faults": {"rest": 0.1}}, "rest"),
        ({"faults": {"push.limit": 0.1}}, "push.limit"),
        ({"push": "127.0.0.1:80"}, "push: '127.0.0.1:80' is not like http://127.0.0.1:8080/path"),
        ({"push": "http://h:port/"}, "push"),
        ({"push": "http://a b/"}, "push"),
        ({"push": "http:///path"}, "push"),
        ({"push": b"http://h/"}, "push"),
        ({"push_sign_key": 1}, "push_sign_key"),
        ({"push_limit_secs": 0}, "push_limit_secs: 0 is not a number above 0"),
        ({"push_tries": 0}, "push_tries: 0 is not a whole number above 0"),
        ({"faults": {"reset": 1.1}}, "reset"),
    ],
)
def test_an_option_out_of_bounds_is_named(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        SimulatorOptions(**options)


@pytest.mark.parametrize(
    "text", ["reset", "reset=", "reset=x", "reset=2", "reset=nan", "rest=0.1", "a.reset=0.1", "=1"]
)
def test_faults_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="faults"):
        parse_faults(text)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", {}),
        ("reset=0.02,confirm.lost=0.1", {"reset": 0.02, "confirm.lost": 0.1}),
        (" pull.slow = 1 , ", {"pull.slow": 1.0}),
    ],
)
def test_faults_are_read(text, faults):
    assert parse_faults(text) == faults


# --- the queue --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def queue_of(clock, **more):
    generator = EventGenerator(1)
    return EventQueue(
        **({"visibility_secs": 30.0, "generator": generator, "random": random.Random(1), "monotonic": clock} | more)
    )


def taken(queue, limit=16):
    return [json.loads(element) for element in queue.take(limit)]


def test_after_the_lease_a_confirm_is_stale_and_the_handle_is_new():
    clock = Clock()
    queue = queue_of(clock)
    queue.feed([b'{"EventType":"A"}'])
    (first,) = taken(queue)
    clock.now = 29.999
    assert taken(queue) == []
    clock.now = 30.0
    with pytest.raises(StaleHandlesError) as stale:
        queue.confirm([first["EventHandle"]], atomic=True)
    assert stale.value.handles == (first["EventHandle"],)
    (second,) = taken(queue)
    assert second["EventType"] == "A"
    assert second["EventHandle"] != first["EventHandle"]
    with pytest.raises(StaleHandlesError):
        queue.confirm([first["EventHandle"]], atomic=True)
    queue.confirm([second["EventHandle"]], atomic=True)
    assert (queue.confirmed, queue.redeliveries) == (1, 1)


@pytest.mark.parametrize(("atomic", "confirmed"), [(True, 0), (False, 2)])
@pytest.mark.parametrize("bad", ["unknown", "repeated", "confirmed before"])
def test_one_stale_handle_fails_a_confirm(atomic, confirmed, bad):
    queue = queue_of(Clock())
    queue.generate(3)
    handles = handles_of(taken(queue))
    bad_handle = {"unknown": "no-handle", "repeated": handles[0], "confirmed before": handles[2]}[bad]
    if bad == "confirmed before":
        queue.confirm([handles[2]], atomic=True)
    before = queue.confirmed
    with pytest.raises(StaleHandlesError) as stale:
        queue.confirm([handles[0], bad_handle, handles[1]], atomic=atomic)
    assert stale.value.handles == (bad_handle,)
    assert queue.confirmed - before == confirmed


def test_redelivered_events_come_before_new_ones_oldest_first():
    clock = Clock()
    queue = queue_of(clock)
    queue.feed(body.encode() for body in bodies(6))
    taken(queue, 2)
    clock.now = 1.0
    taken(queue, 2)
    clock.now = 31.0
    assert [event["Numbered"]["N"] for event in taken(queue)] == [0, 1, 2, 3, 4, 5]


def numbers_of(events):
    return [event["Numbered"]["N"] for event in events]


def refused_of(queue, handles, *, atomic=True):
    """Confirm; return the handles that are reported as refused."""
    try:
        queue.confirm(handles, atomic=atomic)
    except ForgottenHandlesError as error:
        return list(error.handles)
    return []


@pytest.mark.parametrize("number", [1, 3])
def test_the_first_handles_are_refused_until_their_lease_ends(number):
    clock = Clock()
    queue = queue_of(clock, forget_confirms=number)
    queue.feed(body.encode() for body in bodies(5))
    handles = handles_of(taken(queue))
    assert refused_of(queue, handles) == handles[:number]
    assert (queue.confirmed, queue.leased) == (0, 5)
    clock.now = 29.9
    assert refused_of(queue, handles[number:]) == []
    for handle in handles[:number]:
        assert refused_of(queue, [handle]) == [handle]  # alone, and just before the end of its lease
    clock.now = 30.0
    with pytest.raises(StaleHandlesError):
        queue.confirm(handles[:1], atomic=True)
    again = taken(queue)
    assert numbers_of(again) == [*range(number)]
    assert refused_of(queue, handles_of(again)) == []
    assert (queue.confirmed, queue.forgotten, queue.redeliveries) == (5, number, number)


@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4, 5], [5, 3, 4], [1, 0]])
def test_halving_a_refused_set_refuses_no_more_handles(asked):
    queue = queue_of(Clock(), forget_confirms=2)
    queue.generate(6)
    handles = handles_of(taken(queue))
    refused = Counter()

    def halve(part):
        if refused_of(queue, part):
            half = len(part) // 2
            if half:
                halve(part[:half])
                halve(part[half:])
            else:
                refused.update(part)

    chosen = [handles[index] for index in asked]
    halve(chosen)
    halve(chosen[:2])
    assert refused == dict.fromkeys(chosen[:2], 2)
    assert (queue.forgotten, queue.confirmed) == (2, len(asked) - 2)


@pytest.mark.parametrize("times", [2, 9])
def test_a_handle_that_is_refused_again_counts_once(times):
    queue = queue_of(Clock(), forget_confirms=2)
    queue.generate(3)
    first, second, third = handles_of(taken(queue))
    for _ in range(times):
        assert refused_of(queue, [first]) == [first]
    assert refused_of(queue, [third, second]) == [third]
    assert refused_of(queue, [second]) == []
    assert (queue.forgotten, queue.confirmed) == (2, 1)


@pytest.mark.parametrize(("atomic", "confirmed"), [(True, 0), (False, 3)])
@pytest.mark.parametrize("with_stale", [False, True])
def test_a_refused_handle_affects_the_others_as_a_stale_one_does(atomic, confirmed, with_stale):
    queue = queue_of(Clock(), forget_confirms=1)
    queue.generate(4)
    handles = handles_of(taken(queue))
    with pytest.raises(StaleHandlesError if with_stale else ForgottenHandlesError) as error:
        queue.confirm([*handles, *["no-handle"] * with_stale], atomic=atomic)
    assert error.value.handles == (("no-handle",) if with_stale else (handles[0],))
    assert queue.confirmed == confirmed
    assert refused_of(queue, handles[:1], atomic=atomic) == handles[:1]


def test_a_redelivered_event_is_never_refused():
    clock = Clock()
    queue = queue_of(clock, forget_confirms=100)
    queue.feed(body.encode() for body in bodies(2))
    (refused, _) = taken(queue)
    assert refused_of(queue, handles_of([refused])) == handles_of([refused])
    clock.now = 30.0
    assert refused_of(queue, handles_of(taken(queue))) == []
    assert (queue.confirmed, queue.forgotten) == (2, 1)


@pytest.mark.parametrize(
    ("body", "element"),
    [
        (b'{"A":1}', rb'{"EventHandle":"\w+","A":1}'),
        (b"{}", rb'{"EventHandle":"\w+"}'),
        (b"{ }", rb'{"EventHandle":"\w+" }'),
        (b'{"A":\x01 NaN, oops', rb'{"EventHandle":"\w+","A":\x01 NaN, oops'),
        (b"null", rb"null"),
        (b' {"A":1}', rb' {"A":1}'),
    ],
)
def test_a_body_is_passed_on_unchanged(body, element):
    queue = queue_of(Clock())
    queue.feed([body])
    (sent,) = queue.take(16)
    assert re.fullmatch(element, sent)


@pytest.mark.parametrize("keep", [False, True])
def test_the_ledger_has_the_state_of_each_event(keep):
    clock = Clock()
    queue = queue_of(clock, keep_bodies=keep, wall_offset_secs=1000.0)
    queue.feed(body.encode() for body in bodies(4))
    queue.generate(1)
    clock.now = 1.0
    queue.confirm(handles_of(taken(queue, 1)), atomic=True)
    taken(queue, 1)
    clock.now = 31.0
    assert queue.ledger(start=1, count=1)[0]["stranded"]
    taken(queue, 2)
    rows = queue.ledger(bodies=True)
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["times_delivered"] for row in rows] == [1, 2, 1, 0, 0]
    assert [row["confirmed"] for row in rows] == [True, False, False, False, False]
    assert [row["leased"] for row in rows] == [False, True, True, False, False]
    assert [row["stranded"] for row in rows] == [False] * 5
    assert [row["confirmed_at"] for row in rows] == [1001.0, None, None, None, None]
    assert {row["born"] for row in rows} == {1000.0}
    assert [row["body"] for row in rows[:4]] == [bodies(4)[0] if keep else None, *bodies(4)[1:]]
    assert rows[4]["body"] == EventGenerator(1).body(4, 1000.0).decode()
    assert {row["body"] for row in queue.ledger()} == {None}


def test_latencies_are_measured_from_birth():
    clock = Clock()
    queue = queue_of(clock)
    queue.generate(1)
    clock.now = 0.5
    handles = handles_of(taken(queue))
    clock.now = 2.0
    queue.confirm(handles, atomic=True)
    stats = queue.stats()
    assert stats["birth_to_first_pull_secs"]["p99"] == 0.5
    assert stats["birth_to_confirm_secs"]["max"] == 2.0


steps = st.one_of(
    st.tuples(st.just("feed"), st.integers(0, 20)),
    st.tuples(st.just("take"), st.integers(1, 16)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 10.0, 29.9, 30.0])),
    st.tuples(st.just("confirm"), st.lists(st.integers(0, 60), min_size=1, max_size=16)),
    st.tuples(st.just("confirm_any"), st.lists(st.integers(0, 60), min_size=1, max_size=16)),
)


@given(st.lists(steps, max_size=30), st.integers(0, 3))
def test_every_event_is_always_confirmed_leased_or_visible(script, forget):
    clock = Clock()
    queue = queue_of(clock, forget_confirms=forget)
    handles = []
    refused = set()
    for step, value in script:
        match step:
            case "feed":
                queue.generate(value)
            case "take":
                handles += handles_of(taken(queue, value))
            case "wait":
                clock.now += value
            case _:
                chosen = [handles[index % len(handles)] for index in value] if handles else ["none"]
                before = queue.confirmed
                try:
                    queue.confirm(chosen, atomic=step == "confirm")
                except StaleHandlesError:
                    assert step != "confirm" or queue.confirmed == before
                except ForgottenHandlesError as error:
                    assert step != "confirm" or queue.confirmed == before
                    refused.update(error.handles)
        assert conserved(queue.stats())
    assert len(refused) <= queue.forgotten <= forget
    assert len(set(handles)) == len(handles)
    rows = queue.ledger()
    assert sum(row["confirmed"] for row in rows) == queue.confirmed
    assert sum(row["leased"] for row in rows) == queue.leased
    assert sum(row["times_delivered"] for row in rows) == len(handles)
    clock.now += 30.0
    while left := taken(queue):
        for handle in handles_of(left):
            refused.update(refused_of(queue, [handle]))
        clock.now += 30.0
    assert queue.confirmed == queue.fed
    assert queue.forgotten <= forget
    assert queue.forgotten == forget or all(row["times_delivered"] > 1 for row in queue.ledger())


def test_a_sliding_second_drops_what_is_a_second_old():
    second = SlidingSecond()
    for now in (0.0, 0.5, 0.75):
        second.add(now)
    assert [second.count(now) for now in (0.75, 0.999, 1.0, 1.5, 1.75)] == [3, 3, 2, 1, 0]
    second.add(3.0)
    assert second.peak == 3


# --- generated events -------------------------------------------------------------------------------------------------


def test_generated_events_have_documented_shapes_and_unique_ids():
    generator = EventGenerator(3)
    texts = [generator.body(number, 1700000000.25) for number in range(400)]
    events = [json.loads(text) for text in texts]
    types = Counter(event["EventType"] for event in events)
    assert types.most_common(1)[0][0] == "CreateSnapshotByTimeOffsetComplete"
    assert types["CreateSnapshotByTimeOffsetComplete"] > 200
    assert {"NewFileUpload", "ProcedureStateChanged", "FileDeleted", "TranscodeComplete"} < set(types)
    assert all(600 < len(text) < 1000 for text in texts)
    assert all(sum(isinstance(value, dict) for value in event.values()) == 1 for event in events)
    assert len({re.search(rb"[0-9a-f]{32}", text)[0] for text in texts}) == 400
    snapshots = [event["SnapshotByTimeOffsetCompleteEvent"] for event in events if "Snapshot" in event["EventType"]]
    assert len({payload["FileId"] for payload in snapshots}) == len(snapshots)
    assert all(len(payload["FileId"]) == 20 for payload in snapshots)
    assert all(
        payload["SnapshotInfoSet"][0]["Url"].endswith("?born=1700000000.250000")  # the benchmarks read this
        for payload in snapshots
    )
    codes = Counter(image["ErrCode"] != 0 for payload in snapshots for image in payload["SnapshotInfoSet"])
    assert 0 < codes[True] < codes[False] / 4


def test_generated_events_repeat_only_with_the_same_seed():
    first, same, other = (EventGenerator(seed).body(1, 1.0) for seed in (1, 1, 2))
    assert first == same
    assert first != other


# --- with the official client -----------------------------------------------------------------------------------------


@pytest.fixture
def sdk(stack):
    def connect(simulator, *, secret_id=SECRET_ID, secret_key=SECRET_KEY, token=None):
        endpoint = simulator.url.removeprefix("http://")
        profile = ClientProfile(httpProfile=HttpProfile(endpoint=endpoint, protocol="http", reqTimeout=10))
        made = VodClient(Credential(secret_id, secret_key, token), "", profile)
        stack.callback(made.request.conn._session.close)  # noqa: SLF001, RUF100
        return made

    return connect


def sdk_confirm(client, handles):
    request = models.ConfirmEventsRequest()
    request.EventHandles = handles
    return client.ConfirmEvents(request)


def sdk_code(client):
    with pytest.raises(TencentCloudSDKException) as error:
        client.PullEvents(models.PullEventsRequest())
    assert error.value.requestId
    return error.value.code


def test_the_official_client_pulls_and_confirms_everything_once(run, sdk):
    simulator = run(events=40, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    client = sdk(simulator)
    seen = []
    while events := client.PullEvents(models.PullEventsRequest()).EventSet:
        seen += [event.EventType for event in events]
        answer = sdk_confirm(client, [event.EventHandle for event in events])
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer.RequestId)
    stats = simulator.stats()
    assert len(seen) == 40
    assert (stats["confirmed"], stats["redeliveries"], stats["errors"]) == (40, 0, {})
    assert stats["requests"] == {"PullEvents": 4, "ConfirmEvents": 3}
    assert (stats["pulls"], stats["pulls_empty"], stats["confirms"]) == (4, 1, 3)


def test_the_official_client_reads_a_snapshot_event_as_documented(run, sdk):
    simulator = run(events=1)
    (event,) = sdk(simulator).PullEvents(models.PullEventsRequest()).EventSet
    payload = event.SnapshotByTimeOffsetCompleteEvent
    assert event.FileUploadEvent is None
    assert payload.Definition == 10
    assert [image.TimeOffset for image in payload.SnapshotInfoSet] == [10000, 20000]
    born = float(payload.SnapshotInfoSet[0].Url.partition("?born=")[2])
    assert born == pytest.approx(simulator.ledger()[0]["born"], abs=1e-5)
    assert abs(time.time() - born) < 60


@pytest.mark.parametrize(
    ("credentials", "options", "code"),
    [
        ({"secret_id": "AKIDother"}, {}, "AuthFailure.SecretIdNotFound"),
        ({"secret_key": "another"}, {}, "AuthFailure.SignatureFailure"),
        ({}, {"clock_skew_secs": 310.0}, "AuthFailure.SignatureExpire"),
        ({}, {"clock_skew_secs": -310.0}, "AuthFailure.SignatureExpire"),
        ({}, {"token": "right"}, "AuthFailure.TokenFailure"),
        ({"token": "wrong"}, {"token": "right"}, "AuthFailure.TokenFailure"),
    ],
)
def test_each_flaw_of_a_signature_has_its_code(run, sdk, credentials, options, code):
    simulator = run(events=1, secret_id=SECRET_ID, secret_key=SECRET_KEY, **options)
    assert sdk_code(sdk(simulator, **credentials)) == code
    stats = simulator.stats()
    assert (stats["errors"], stats["visible"]) == ({code: 1}, 1)


@pytest.mark.parametrize("options", [{"token": "right"}, {"token": "right", "clock_skew_secs": 290.0}])
def test_a_right_token_and_a_clock_that_is_nearly_right_are_accepted(run, sdk, options):
    simulator = run(events=1, secret_id=SECRET_ID, secret_key=SECRET_KEY, **options)
    assert len(sdk(simulator, token="right").PullEvents(models.PullEventsRequest()).EventSet) == 1


def event_config(client):
    answer = client.DescribeEventConfig(models.DescribeEventConfigRequest())
    switches = ("UploadMediaCompleteEventSwitch", "DeleteMediaCompleteEventSwitch", "PersistenceCompleteEventSwitch")
    return answer.Mode, answer.NotificationUrl, *(getattr(answer, name) for name in switches)


def waiting(client):
    return client.DescribeEventsState(models.DescribeEventsStateRequest()).CountOfEventsToPull


def test_the_official_client_reads_the_settings_of_callbacks(run, sdk):
    simulator = run(secret_id=SECRET_ID, secret_key=SECRET_KEY)
    client = sdk(simulator)
    assert event_config(client) == ("PULL", "", "ON", "ON", "ON")
    simulator.control(mode="PUSH", events_off=["FileDeleted", "NewFileUpload"])
    assert event_config(client) == ("PUSH", "", "OFF", "OFF", "ON")


def test_the_official_client_counts_the_events_that_wait(run, sdk):
    client = sdk(run(events=20, visibility_secs=0.3, secret_id=SECRET_ID, secret_key=SECRET_KEY))
    assert waiting(client) == 20
    client.PullEvents(models.PullEventsRequest())
    assert waiting(client) == 4
    until(lambda: waiting(client) == 20, what="the leased events wait again")


@pytest.mark.parametrize("action", ["DescribeEventConfig", "DescribeEventsState"])
def test_a_query_about_another_application_is_refused(run, client, action):
    api = client(run(sub_app_id=5))
    assert code_of(api.call(action)) == "InvalidParameterValue.SubAppId"
    assert code_of(api.call(action, {"SubAppId": 5})) is None
    assert code_of(api.call(action, {"SubAppId": 5, "ExtInfo": ""})) == "UnknownParameter"


def test_backlog_queries_have_a_lower_quota_than_pulls(run, client):
    api = client(run(requests_per_sec=100))
    codes = [code_of(api.call("DescribeEventsState")) for _ in range(25)]
    assert codes == [None] * 20 + ["RequestLimitExceeded"] * 5
    assert {code_of(api.call("DescribeEventConfig")) for _ in range(25)} == {None}


def test_pulls_are_empty_while_the_application_pushes(run, client):
    simulator = run(mode="PUSH", events=3, poll_secs=0.0)
    api = client(simulator)
    assert api.pull() == []
    assert simulator.stats()["visible"] == 3
    simulator.control(mode="PULL")
    assert len(api.pull()) == 3


def test_a_hanging_pull_gets_its_events_when_the_mode_changes(run, client):
    simulator = run(mode="PUSH", events=3, poll_secs=20.0)
    api = client(simulator)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pulled = pool.submit(api.pull)
        until(lambda: simulator.stats()["pulls_hanging_now"] == 1)
        simulator.control(mode="PULL")
        assert len(pulled.result(10)) == 3


def signed(body, *, names="content-type;host", host="h", sent_host=None, service="vod", date=None, at=None):
    """The headers of a request with a right or a wrong signature."""
    at = int(time.time()) if at is None else at
    date = date or datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
    values = {"content-type": "application/json", "host": host, "x-tc-action": "pullevents"}
    lines = "".join(f"{name}:{values[name]}\n" for name in names.split(";"))
    canonical = f"POST\n/\n\n{lines}\n{names}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{date}/{service}/tc3_request"
    text = f"TC3-HMAC-SHA256\n{at}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"TC3{SECRET_KEY}".encode()
    for part in (date, service, "tc3_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    claim = f"TC3-HMAC-SHA256 Credential={SECRET_ID}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {
        "Host": sent_host or host,
        "Content-Type": "application/json",
        "X-TC-Action": "PullEvents",
        "X-TC-Version": "2018-07-17",
        "X-TC-Timestamp": str(at),
        "Authorization": claim,
    }


@pytest.mark.parametrize(
    ("how", "changes", "code"),
    [
        ({}, {}, None),
        ({"names": "content-type;host;x-tc-action"}, {}, None),
        ({"host": "127.0.0.1:80"}, {}, None),
        ({"host": "127.0.0.1", "sent_host": "127.0.0.1:80"}, {}, None),  # as the SDK of Node.js does
        ({"host": "[::1]", "sent_host": "[::1]:18080"}, {}, None),
        ({"host": "127.0.0.1:80", "sent_host": "127.0.0.1"}, {}, "AuthFailure.SignatureFailure"),
        ({"host": "127.0.0.1:81", "sent_host": "127.0.0.1:80"}, {}, "AuthFailure.SignatureFailure"),
        ({"host": "localhost", "sent_host": "127.0.0.1:80"}, {}, "AuthFailure.SignatureFailure"),
        ({"names": "host;content-type"}, {}, "AuthFailure.SignatureFailure"),
        ({"names": "host"}, {}, "AuthFailure.SignatureFailure"),
        ({"names": "content-type;host;x-tc-action"}, {"X-TC-Action": "ConfirmEvents"}, "AuthFailure.SignatureFailure"),
        ({"service": "cvm"}, {}, "AuthFailure.SignatureFailure"),
        ({"date": "2020-01-01"}, {}, "AuthFailure.SignatureFailure"),
        ({}, {"Host": "other"}, "AuthFailure.SignatureFailure"),
        ({}, {"Content-Type": "text/plain"}, "AuthFailure.SignatureFailure"),
        ({}, {"X-TC-Timestamp": "soon"}, "AuthFailure.SignatureExpire"),
        ({}, {"X-TC-Timestamp": "9" * 5000}, "AuthFailure.SignatureExpire"),
        ({}, {"Authorization": "Bearer x"}, "AuthFailure.InvalidAuthorization"),
        ({}, {"Authorization": None}, "MissingParameter"),
        ({}, {"X-TC-Timestamp": None}, "MissingParameter"),
    ],
)
def test_the_signed_request_must_be_the_sent_request(run, client, how, changes, code):
    simulator = run(events=1, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    headers = {name: value for name, value in (signed(b"{}", **how) | changes).items() if value is not None}
    _, _, content = client(simulator).request("POST", "/", b"{}", headers)
    assert code_of(json.loads(content)["Response"]) == code


def test_a_body_that_was_changed_after_signing_is_refused(run, client):
    simulator = run(events=1, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    _, _, content = client(simulator).request("POST", "/", b'{"SubAppId":1}', signed(b"{}"))
    assert code_of(json.loads(content)["Response"]) == "AuthFailure.SignatureFailure"


# --- the API ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "body", "headers", "code"),
    [
        ("DescribeMediaInfos", {}, {}, "InvalidAction"),
        (None, {}, {}, "MissingParameter"),
        ("PullEvents", {}, {"Version": None}, "MissingParameter"),
        ("PullEvents", {}, {"Version": "2017-03-12"}, "NoSuchVersion"),
        ("PullEvents", [], {}, "InvalidParameter"),
        ("PullEvents", {"EventHandles": []}, {}, "UnknownParameter"),
        ("PullEvents", {"SubAppId": "5"}, {}, "InvalidParameter"),
        ("PullEvents", {"SubAppId": 6}, {}, "ResourceNotFound.UserNotExist"),
        ("PullEvents", {}, {}, "ResourceNotFound.UserNotExist"),
        ("ConfirmEvents", {"EventHandles": ["a"], "SubAppId": 6}, {}, "InvalidParameterValue.SubAppId"),
        ("ConfirmEvents", {"SubAppId": 5}, {}, "MissingParameter"),
        ("ConfirmEvents", {"EventHandles": [], "SubAppId": 5}, {}, "InvalidParameter"),
        ("ConfirmEvents", {"EventHandles": ["a"] * 17, "SubAppId": 5}, {}, "InvalidParameter"),
        ("ConfirmEvents", {"EventHandles": [1], "SubAppId": 5}, {}, "InvalidParameter"),
        ("ConfirmEvents", {"EventHandles": "a", "SubAppId": 5}, {}, "InvalidParameter"),
        ("ConfirmEvents", {"EventHandles": ["a"], "SubAppId": 5}, {}, "InvalidParameterValue.EventHandle"),
    ],
)
def test_each_wrong_request_has_its_code_and_takes_no_event(run, client, action, body, headers, code):
    simulator = run(events=1, sub_app_id=5)
    answer = client(simulator).call(action, body, **({"Action": action} | headers))
    assert code_of(answer) == code
    assert answer["RequestId"]
    assert simulator.stats()["errors"] == {code: 1}
    assert simulator.stats()["visible"] == 1


def test_a_body_that_is_not_json_is_a_parameter_error(run, client):
    headers = {"X-TC-Action": "PullEvents", "X-TC-Version": "2018-07-17"}
    _, _, content = client(run()).request("POST", "/", b"{", headers)
    assert code_of(json.loads(content)["Response"]) == "InvalidParameter"


def test_the_right_sub_app_id_gets_its_events(run, client):
    api = client(run(events=1, sub_app_id=5))
    assert len(api.call("PullEvents", {"SubAppId": 5})["EventSet"]) == 1


@pytest.mark.system
def test_the_quota_holds_over_a_sliding_second_for_each_action(run, client):
    simulator = run(requests_per_sec=3)
    api = client(simulator)
    codes = [code_of(api.call("PullEvents")) for _ in range(5)]
    assert codes == [None, None, None, "RequestLimitExceeded", "RequestLimitExceeded"]
    assert code_of(api.confirm(["a"])) == "InvalidParameterValue.EventHandle"
    stats = simulator.stats()
    assert (stats["refused_by_limit"], stats["pulls"]) == (2, 3)
    assert {name: peak for name, peak in stats["peak_requests_per_sec"].items() if peak} == {
        "PullEvents": 5,
        "ConfirmEvents": 1,
    }
    until(lambda: code_of(api.call("PullEvents")) is None, what="the quota comes back")


@pytest.mark.parametrize(("confirms", "allowed"), [(2, 2), (0, 6)])
def test_confirms_can_have_a_quota_of_their_own(run, client, confirms, allowed):
    api = client(run(requests_per_sec=4, confirms_per_sec=confirms))
    codes = [code_of(api.confirm(["a"])) for _ in range(6)]
    assert codes.count("RequestLimitExceeded") == 6 - allowed
    assert [code_of(api.call("PullEvents")) for _ in range(5)].count(None) == 4


def test_an_event_whose_lease_ends_goes_to_the_hanging_pull(run, client):
    simulator = run(events=1, poll_secs=10.0, visibility_secs=0.2)
    api = client(simulator)
    (first,) = api.pull()
    asked_at = time.monotonic()
    (second,) = api.pull()
    assert time.monotonic() - asked_at < 5
    assert first["EventHandle"] != second["EventHandle"]
    assert {**first, "EventHandle": ""} == {**second, "EventHandle": ""}
    assert code_of(api.confirm(handles_of([first]))) == "InvalidParameterValue.EventHandle"


@pytest.mark.parametrize(("stale", "confirmed"), [("atomic", 0), ("per_handle", 2)])
def test_a_stale_handle_affects_the_others_as_the_option_says(run, client, stale, confirmed):
    simulator = run(events=2, stale=stale)
    api = client(simulator)
    answer = api.confirm([*handles_of(api.pull()), "stale"])
    assert code_of(answer) == "InvalidParameterValue.EventHandle"
    stats = simulator.stats()
    assert (stats["confirmed"], stats["confirms_stale"], stats["confirms"]) == (confirmed, 1, 0)


@pytest.mark.parametrize(
    ("denied", "codes"),
    [
        (["ConfirmEvents"], [None, "UnauthorizedOperation"]),
        (["PullEvents"], ["UnauthorizedOperation", None]),
        (["PullEvents", "ConfirmEvents"], ["UnauthorizedOperation"] * 2),
    ],
)
def test_a_denied_action_has_no_effect_until_the_right_is_granted(run, client, denied, codes):
    simulator = run(events=17, secret_id=None)
    api = client(simulator)
    handles = handles_of(api.pull())
    simulator.control(deny=denied)
    assert [code_of(api.call("PullEvents")), code_of(api.confirm(handles))] == codes
    stats = simulator.stats()
    assert stats["visible"] == (1 if codes[0] else 0)
    assert stats["confirmed"] == (0 if codes[1] else 16)
    assert stats["errors"] == {"UnauthorizedOperation": len(denied)}
    assert json.loads(api.request("POST", "/_control", b'{"deny": []}')[2]) == {"changed": ["deny"]}
    assert code_of(api.call("PullEvents")) is None
    assert code_of(api.confirm(handles)) == (None if codes[1] else "InvalidParameterValue.EventHandle")


def test_a_wrong_signature_is_reported_before_a_missing_right(run, sdk):
    simulator = run(deny=["PullEvents"], secret_id=SECRET_ID, secret_key=SECRET_KEY)
    assert sdk_code(sdk(simulator, secret_key="another")) == "AuthFailure.SignatureFailure"
    assert sdk_code(sdk(simulator)) == "UnauthorizedOperation"


@pytest.mark.system
@pytest.mark.parametrize("stale", ["atomic", "per_handle"])
@pytest.mark.parametrize(("refused", "other"), [(5, 6), (0, None)])
def test_confirms_of_one_application_can_be_refused_in_every_lease(run, client, stale, refused, other):
    simulator = run(events=2, batch=1, stale=stale, refuse_confirms_of=[refused], visibility_secs=0.3, poll_secs=10.0)
    api = client(simulator)
    of_app = {app: {} if app is None else {"SubAppId": app} for app in (refused, other)}
    for _ in range(3):
        (event,) = api.call("PullEvents", of_app[refused])["EventSet"]
        answer = api.confirm(handles_of([event]), **of_app[refused])
        assert code_of(answer) == "InvalidParameterValue"
        assert "subappid" not in answer["Error"]["Message"].lower()  # the message of VOD does not name it either
    (event,) = api.call("PullEvents", of_app[other])["EventSet"]
    assert code_of(api.confirm(handles_of([event]), **of_app[other])) is None
    simulator.control(refuse_confirms_of=[])
    (event,) = api.call("PullEvents", of_app[refused])["EventSet"]
    assert code_of(api.confirm(handles_of([event]), **of_app[refused])) is None
    assert simulator.stats()["confirmed"] == 2


@pytest.mark.system
@pytest.mark.parametrize(("stale", "confirmed"), [("atomic", 0), ("per_handle", 3)])
def test_a_refused_confirm_is_a_parameter_error_until_redelivery(run, client, stale, confirmed):
    simulator = run(events=4, stale=stale, forget_confirms=1, visibility_secs=1.0, poll_secs=10.0)
    api = client(simulator)
    first, *others = handles_of(api.pull())
    assert [code_of(api.confirm(part)) for part in ([first, *others], [first])] == ["InvalidParameterValue"] * 2
    stats = simulator.stats()
    assert (stats["confirmed"], stats["confirms"], stats["confirms_stale"]) == (confirmed, 0, 0)
    assert (stats["confirms_forgotten"], stats["errors"]) == (1, {"InvalidParameterValue": 2})
    if stale == "atomic":
        assert code_of(api.confirm(others)) is None
    assert code_of(api.confirm(handles_of(api.pull()))) is None
    assert (simulator.stats()["confirmed"], simulator.stats()["redeliveries"]) == (4, 1)


EMPTY_FORMS = {
    "null": {"EventSet": None},
    "error": {"Error": {"Code": "ResourceNotFound", "Message": "no event"}},
    "list": {"EventSet": []},
    "absent": {},
}


@pytest.mark.parametrize("form", EMPTY_FORMS)
def test_an_empty_queue_answers_in_the_chosen_form(run, client, form):
    simulator = run(empty=form)
    answer = client(simulator).call("PullEvents")
    assert answer.pop("RequestId")
    assert answer == EMPTY_FORMS[form]
    assert (simulator.stats()["pulls_empty"], simulator.stats()["errors"]) == (1, {})


def test_mixed_empty_answers_use_all_forms_in_turn(run, client):
    api = client(run(empty="mixed"))
    answers = [api.call("PullEvents") for _ in range(8)]
    for answer in answers:
        del answer["RequestId"]
    assert answers == [*EMPTY_FORMS.values()] * 2


def test_an_empty_queue_answers_after_the_poll_time(run, client):
    api = client(run(poll_secs=0.3))
    started_at = time.monotonic()
    assert api.pull() == []
    assert 0.29 < time.monotonic() - started_at < 5


def test_hanging_pulls_get_new_events_in_the_order_of_their_waiting(run, client):
    simulator = run(poll_secs=30.0)
    got = []

    def pull(name, api):
        got.append((name, api.pull()))

    threads = []
    for name in "ab":
        thread = threading.Thread(target=pull, args=(name, client(simulator)))
        thread.start()
        threads.append(thread)
        until(lambda: simulator.stats()["pulls_hanging_now"] == len(threads), what="the pull hangs")
    for number, thread in enumerate(threads):
        simulator.feed(bodies(1))
        thread.join(10)
        assert [name for name, _ in got] == ["a", "b"][: number + 1]
    assert [len(events) for _, events in got] == [1, 1]


def test_a_client_that_disconnects_during_its_pull_takes_no_event(run, client):
    simulator = run(poll_secs=30.0)
    host, port = simulator.url.removeprefix("http://").split(":")
    head = "POST / HTTP/1.1\r\nX-TC-Action: PullEvents\r\nX-TC-Version: 2018-07-17\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(head.encode())
        until(lambda: simulator.stats()["pulls_hanging_now"] == 1, what="the pull hangs")
    until(lambda: simulator.stats()["pulls_abandoned"] == 1, what="the pull is given up")
    simulator.feed(bodies(3))
    assert simulator.stats()["visible"] == 3
    assert len(client(simulator).pull()) == 3


def test_round_trips_of_many_connections_run_at_the_same_time(run, client):
    simulator = run(events=640, rtt_secs=0.4)
    apis = [client(simulator) for _ in range(64)]
    got = []
    threads = [threading.Thread(target=lambda api=api: got.append(len(api.pull()))) for api in apis]
    started_at = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_secs = time.monotonic() - started_at
    assert 0.39 < took_secs < 6.4  # one after the other it would be 25.6
    assert sum(got) == 640


def test_the_date_header_shows_the_skewed_clock(run, client):
    _, headers, _ = client(run(clock_skew_secs=86400.0)).send("PullEvents")
    ahead_secs = parsedate_to_datetime(headers["Date"]).timestamp() - time.time()
    assert ahead_secs == pytest.approx(86400, abs=60)
    assert headers["Content-Type"] == "application/json"


def test_each_answer_has_a_debug_line(stack, client):
    stream = io.StringIO()
    log = make_logger(stream, level="debug", log_format="json")
    simulator = stack.enter_context(Simulator(SimulatorOptions(events=2, poll_secs=0), log))
    api = client(simulator)
    request_id = api.call("PullEvents")["RequestId"]
    api.confirm(["stale"])
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    answered = [line for line in lines if line["event"] == "simulator.answered"]
    assert (answered[0]["request_id"], answered[0]["events"]) == (request_id, 2)
    assert answered[1]["error_code"] == "InvalidParameterValue.EventHandle"
    assert "simulator.answered" in CATALOGUE


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "leased"),
    [("reset", ConnectionResetError, 0), ("lost", http.client.RemoteDisconnected, 1)],
)
def test_a_reset_takes_no_event_and_a_lost_answer_takes_one(run, client, fault, error, leased):
    simulator = run(events=1, faults={fault: 1.0})
    with pytest.raises(error) as raised:
        client(simulator).pull()
    assert type(raised.value) is error
    stats = simulator.stats()
    assert (stats["outstanding"], stats["faults"]) == (leased, {f"pull.{fault}": 1})


def test_a_confirm_whose_answer_is_lost_has_taken_effect(run, client):
    simulator = run(events=2, faults={"confirm.lost": 1.0})
    api = client(simulator)
    handles = handles_of(api.pull())
    with pytest.raises(http.client.RemoteDisconnected):
        api.confirm(handles)
    assert simulator.stats()["confirmed"] == 2
    simulator.control(faults={})
    assert code_of(client(simulator).confirm(handles)) == "InvalidParameterValue.EventHandle"


def test_http_5xx_is_not_json_and_takes_no_event(run, client):
    simulator = run(events=1, faults={"http_5xx": 1.0})
    status, headers, content = client(simulator).send("PullEvents")
    assert status in {500, 502, 503, 504}
    assert headers["Content-Type"] == "text/html"
    assert content.startswith(b"<html>")
    assert simulator.stats()["visible"] == 1


@pytest.mark.parametrize(("fault", "code"), [("internal_error", "InternalError"), ("limit", "RequestLimitExceeded")])
def test_errors_of_the_service_take_no_event(run, client, fault, code):
    simulator = run(events=1, faults={f"pull.{fault}": 1.0})
    api = client(simulator)
    assert code_of(api.call("PullEvents")) == code
    assert code_of(api.confirm(["a"])) == "InvalidParameterValue.EventHandle"
    stats = simulator.stats()
    assert (stats["visible"], stats["refused_by_limit"]) == (1, 0)


def test_a_truncated_answer_breaks_the_connection_or_the_json(run, client):
    simulator = run(events=20, batch=1, faults={"truncated": 1.0})
    broken = Counter()
    for _ in range(20):
        try:
            _, _, content = client(simulator).send("PullEvents")
        except http.client.IncompleteRead:
            broken["connection"] += 1
        else:
            with pytest.raises(ValueError, match="line 1"):
                json.loads(content)
            broken["json"] += 1
    assert min(broken["connection"], broken["json"]) > 0
    assert simulator.stats()["outstanding"] == 20


@pytest.mark.system
def test_the_lease_of_a_slow_answer_starts_before_its_delay(run, client):
    simulator = run(events=1, faults={"slow": 1.0}, slow_secs=0.4, visibility_secs=0.1)
    api = client(simulator)
    started_at = time.monotonic()
    handles = handles_of(api.pull())
    assert time.monotonic() - started_at > 0.39
    assert code_of(api.confirm(handles)) == "InvalidParameterValue.EventHandle"


@pytest.mark.system
@pytest.mark.parametrize("slow", ["confirm", "pull"])
def test_calls_of_one_action_can_hang_while_the_other_answers_at_once(run, client, slow):
    simulator = run(events=16, faults={f"{slow}.slow": 1.0}, slow_secs=1.5)
    api = client(simulator)
    times = [time.monotonic()]
    handles = handles_of(api.pull())
    times.append(time.monotonic())
    assert code_of(api.confirm(handles)) is None
    times.append(time.monotonic())
    took_secs = {"pull": times[1] - times[0], "confirm": times[2] - times[1]}
    hung_secs = took_secs.pop(slow)
    assert hung_secs >= 1.49
    assert max(took_secs.values()) < 1.4
    assert (simulator.stats()["confirmed"], simulator.stats()["faults"]) == (16, {f"{slow}.slow": 1})
    assert (simulator.stats()["birth_to_confirm_secs"]["max"] < 1.4) == (
        slow == "confirm"
    )  # a slow confirm takes effect before its delay


def test_a_fault_of_one_action_overrides_the_general_one(run, client):
    simulator = run(events=1, faults={"internal_error": 1.0, "confirm.internal_error": 0.0})
    api = client(simulator)
    assert code_of(api.call("PullEvents")) == "InternalError"
    assert code_of(api.confirm(["a"])) == "InvalidParameterValue.EventHandle"


def test_faults_have_the_given_rate_and_repeat_with_the_same_seed(run, client):
    def codes():
        api = client(run(faults={"internal_error": 0.3}, seed=11))
        return [code_of(api.call("PullEvents")) for _ in range(200)]

    first = codes()
    assert 30 < first.count("InternalError") < 90
    assert codes() == first


def test_no_event_is_lost_whatever_the_faults(run, client):
    faults = "reset=0.1,http_5xx=0.1,internal_error=0.1,limit=0.1,truncated=0.1,lost=0.1"
    simulator = run(events=60, faults=parse_faults(faults), visibility_secs=0.1, stale="per_handle")
    deadline = time.monotonic() + 30
    while simulator.stats()["confirmed"] < 60 and time.monotonic() < deadline:
        api = Client(simulator.url)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AssertionError):
            if events := api.pull():
                api.confirm(handles_of(events))
        api.connection.close()
        assert conserved(simulator.stats())
    assert simulator.stats()["confirmed"] == 60
    assert simulator.stats()["redeliveries"] > 0


# --- feeding ----------------------------------------------------------------------------------------------------------

RAW_LINES = [
    b'{"EventType":"A","Id":12345678901234567890}',
    b"{broken",
    b"not an object",
    b'{"EventType":"\xff\xfe"}',
    b"{}",
]


def test_lines_of_a_file_are_served_unchanged_even_if_invalid(run, client, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join(RAW_LINES[:2]) + b"\n\n  \n" + b"\n".join(RAW_LINES[2:]))
    simulator = run(events_file=path)
    _, _, content = client(simulator).send("PullEvents")
    without_handles = re.sub(rb'"EventHandle":"\w+",?', b"", content)
    assert without_handles.startswith(b'{"Response":{"EventSet":[' + b",".join(RAW_LINES) + b'],"RequestId":')
    assert content.count(b"EventHandle") == 4
    assert simulator.stats()["fed"] == 5


def test_a_missing_events_file_fails_the_start(tmp_path):
    simulator = Simulator(SimulatorOptions(events_file=tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        simulator.start()
    simulator.stop()


def test_a_port_in_use_fails_the_start(run):
    port = int(run().url.rpartition(":")[2])
    simulator = Simulator(SimulatorOptions(port=port))
    with pytest.raises(OSError, match=str(port)):
        simulator.start()
    simulator.stop()


@pytest.mark.parametrize("from_file", [False, True])
def test_a_rate_generates_events_up_to_its_total(run, client, tmp_path, from_file):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(bodies(30)))
    more = {"events_file": path} if from_file else {}
    simulator = run(events=2, rate=200.0, feed=20, poll_secs=10.0, **more)
    api = client(simulator)
    events = []
    while len(events) < 22:
        events += api.pull()
    stats = simulator.stats()
    assert (len(events), stats["fed"], stats["feeding"]) == (22, 22, False)
    born = [row["born"] for row in simulator.ledger()]
    assert born[-1] - born[0] > 0.09  # the first generated event may be late, the last must not be early
    if from_file:
        assert [event["Numbered"]["N"] for event in events[2:]] == [*range(20)]


def test_a_rate_without_a_total_ends_with_its_file(run, tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(bodies(5)))
    simulator = run(rate=500.0, events_file=path)
    until(lambda: not simulator.stats()["feeding"], what="the file is at its end")
    assert simulator.stats()["fed"] == 5


def test_a_rate_without_a_total_and_file_does_not_end(run):
    simulator = run(rate=1000.0)
    until(lambda: simulator.stats()["fed"] > 100, what="events are born")
    assert simulator.stats()["feeding"]


# --- control ----------------------------------------------------------------------------------------------------------


def test_the_control_endpoints_report_feed_and_change(run, client):
    simulator = run(events=1, secret_id=SECRET_ID, secret_key=SECRET_KEY)
    control = client(simulator)
    assert json.loads(control.request("POST", "/_feed", b"{}\n\n{broken\n")[2]) == {"fed": 2}
    changes = {"secret_id": None, "secret_key": None, "faults": "confirm.internal_error=1", "empty": "list"}
    assert json.loads(control.request("POST", "/_control", json.dumps(changes))[2]) == {"changed": sorted(changes)}
    _, _, content = control.send("PullEvents")
    assert content.count(b"EventHandle") == 3
    assert code_of(control.confirm(["a"])) == "InternalError"
    stats = json.loads(control.request("GET", "/_stats")[2])
    assert stats == simulator.stats()
    assert (stats["fed"], stats["outstanding"], stats["errors"]) == (3, 3, {"InternalError": 1})
    rows = json.loads(control.request("GET", "/_ledger?from=1&n=1&bodies=1")[2])
    assert rows == simulator.ledger(start=1, count=1, bodies=True)
    assert [(row["number"], row["body"], row["leased"]) for row in rows] == [(1, "{}", True)]
    assert len(json.loads(control.request("GET", "/_ledger")[2])) == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/_control", b'{"port": 5}', 400, "port"),
        ("POST", "/_control", b'{"faults": {"reset": 3}}', 400, "reset"),
        ("POST", "/_control", b'{"faults": "rest=1"}', 400, "rest"),
        ("POST", "/_control", b'{"rtt_secs": "1"}', 400, "rtt_secs"),
        ("POST", "/_control", b'{"secret_key": "only"}', 400, "secret_id"),
        ("POST", "/_control", b"[]", 400, "object"),
        ("POST", "/_control", b"{", 400, "error"),
        ("GET", "/_ledger?n=-1", b"", 400, "-1"),
        ("GET", "/_ledger?from=x", b"", 400, "x"),
        ("GET", "//[", b"", 400, "error"),
        ("GET", "/", b"", 404, "/_stats"),
        ("GET", "/other", b"", 404, "/_stats"),
        ("POST", "/_stats", b"", 404, "/_stats"),
    ],
)
def test_a_wrong_control_request_changes_nothing_and_names_why(run, client, method, path, body, status, message):
    simulator = run(events=1)
    api = client(simulator)
    got, _, content = api.request(method, path, body)
    assert got == status
    assert message in content.decode()
    assert len(api.pull()) == 1


def test_control_refuses_an_option_that_cannot_change(run):
    with pytest.raises(ValueError, match="visibility_secs"):
        run().control(visibility_secs=1.0)


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1\r\nno header\r\n\r\n",
        b"POST / HTTP/1.1\r\n folded: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nX: " + b"x" * 70_000,
    ],
)
def test_an_invalid_request_is_answered_400_and_disconnected(run, sent):
    simulator = run()
    host, port = simulator.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as peer:
        peer.sendall(sent)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := peer.recv(65536):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert simulator.stats()["bad_requests"] == 1


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (bytes.fromhex("160301020001000100"), "TLS"),
        (b"\x05\x01\x00", "did not send HTTP"),  # SOCKS
        (b"\x00" * 100, "did not send HTTP"),
        (b"\xff", "did not send HTTP"),
    ],
)
def test_a_client_that_does_not_use_http_causes_a_warning(hello, words):
    warnings = []
    with Simulator(warn=warnings.append) as simulator:
        host, port = simulator.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as peer, contextlib.suppress(ConnectionResetError):
            peer.sendall(hello)
            assert peer.recv(65536) == b""
        assert simulator.stats()["bad_requests"] == 1
    (warning,) = warnings
    assert words in warning


@pytest.mark.system
def test_a_client_with_https_fails_at_once_and_the_command_warns():
    root = str(Path(vodpoller.__file__).parents[1])
    command = [sys.executable, "-m", "vodpoller", "simulate"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}
    ) as process:
        try:
            host, port = process.stdout.readline().strip().removeprefix("http://").split(":")
            with pytest.raises(OSError, match=r"(?i)eof|reset|ssl"):
                http.client.HTTPSConnection(host, int(port), timeout=10).request("GET", "/")
            assert "use its http:// address" in process.stderr.readline()
        finally:
            process.kill()


def test_the_help_lists_every_fault():
    help_text = CliRunner().invoke(main, ["simulate", "--help"]).output
    for fault in FAULTS:
        assert re.search(rf"\b{fault}\b", help_text), fault


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--confirms-per-sec", "[default: as --requests-per-sec]"),
        ("--deny ACTION", "UnauthorizedOperation"),
        ("--forget-confirms", "refused during their lease"),
        ("--slow-secs", "slow"),
    ],
)
def test_the_help_describes_the_option(option, words):
    help_text = " ".join(CliRunner().invoke(main, ["simulate", "--help"]).output.split())
    _, _, rest = help_text.partition(f" {option} ")
    assert words in re.split(r" --(?!requests)", rest)[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--deny", "ConfirmEvent"], "deny: 'ConfirmEvent' is not one of PullEvents, ConfirmEvents"),
        (["--confirms-per-sec", "-1"], "confirms_per_sec: -1.0 is not a number of 0 or more"),
        (["--forget-confirms", "-1"], "forget_confirms: -1 is not a whole number of 0 or more"),
    ],
)
def test_the_command_refuses_a_wrong_value(args, message):
    result = CliRunner().invoke(main, ["simulate", *args])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.system
@pytest.mark.parametrize("denied", [["ConfirmEvents"], ["PullEvents", "ConfirmEvents"]])
def test_the_command_denies_each_named_action(client, denied):
    options = [part for action in denied for part in ("--deny", action)]
    command = [sys.executable, "-m", "vodpoller", "simulate", "--events", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            api = client(SimpleNamespace(url=process.stdout.readline().strip()))
            codes = {"PullEvents": code_of(api.call("PullEvents")), "ConfirmEvents": code_of(api.confirm(["a"]))}
        finally:
            process.kill()
    assert [action for action, code in codes.items() if code == "UnauthorizedOperation"] == denied


def test_split_joined_and_100_continue_requests_are_served(run):
    simulator = run()
    host, port = simulator.url.removeprefix("http://").split(":")
    request = b"POST /_feed HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection((host, int(port)), timeout=10) as peer, peer.makefile("rb") as answers:
        peer.sendall(request[:30])
        until(lambda: simulator.stats()["connections_now"] == 1, what="the first piece is there")
        peer.sendall(request[30:] + request + request)
        for _ in range(3):
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            while answers.readline() != b"\r\n":
                pass
            assert answers.read(len(b'{"fed":1}')) == b'{"fed":1}'
        peer.sendall(b"POST /_feed HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 2\r\n\r\n")
        assert answers.readline() == b"HTTP/1.1 100 Continue\r\n"
        peer.sendall(b"{}")
        assert answers.read().endswith(b'{"fed":1}')
    assert simulator.stats()["fed"] == 4


# --- start and stop ---------------------------------------------------------------------------------------------------


def test_a_stopped_simulator_disconnects_clients_and_keeps_its_stats(client):
    simulator = Simulator(SimulatorOptions(poll_secs=30.0))
    assert simulator.url == ""
    assert simulator.start() == simulator.url
    api = client(simulator)
    failed = []

    def pull():
        try:
            api.pull()
        except (OSError, http.client.HTTPException) as error:
            failed.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    until(lambda: simulator.stats()["pulls_hanging_now"] == 1, what="the pull hangs")
    simulator.stop()
    simulator.stop()
    thread.join(10)
    assert len(failed) == 1
    stats = simulator.stats()
    assert (stats["pulls_hanging_now"], stats["connections_now"]) == (0, 0)
    assert simulator.ledger() == []


SERVE = """
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import serve
serve(SimulatorOptions(events=20), None, lambda url: print(url, flush=True))
"""


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_a_signal_and_exits_0(number):
    root = str(Path(vodpoller.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            api = Client(process.stdout.readline().strip())
            assert len(api.pull()) == 16
            process.send_signal(number)
            assert process.wait(10) == 0
            api.connection.close()
        finally:
            process.kill()
