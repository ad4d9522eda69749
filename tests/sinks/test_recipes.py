"""The recipes of the page about sinks, unchanged, with stubs that have the documented behaviour."""

import base64
import hashlib
import hmac
import json
import re
import time
import tomllib
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from standardwebhooks import Webhook

from tests.helpers import FakeClock, MemoryLedger, log_into, send, sink_context
from tests.receiver import Answer, Receiver, running_receiver
from vodpoller.config import load as config
from vodpoller.delivery.in_flight import InFlight
from vodpoller.delivery.worker import Worker
from vodpoller.events.event import make_event
from vodpoller.liveness import Liveness
from vodpoller.router import Router
from vodpoller.settlement import Reason
from vodpoller.telemetry import Telemetry

PAGE = Path(__file__).parents[2] / "vodpoller" / "sinks" / "README.md"
SCF_SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
DINGTALK_SECRET = "SEC" + "0123456789abcdef" * 4
FEISHU_SECRET = "b0tS3cretOfFeishu12345"
SECRETS = {"dingtalk_secret": DINGTALK_SECRET, "feishu_secret": FEISHU_SECRET, "scf_secret": SCF_SECRET}
REST = """
[[sources]]
name = "main"
unrouted = "confirm"

[journal]
path = "journal.db"

[credentials]
secret_id = "any"
secret_key = "any-key"
"""


def recipes():
    section = PAGE.read_text().partition("\n## webhook\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```toml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return {next(iter(tomllib.loads(text)["sinks"])): text for text in found}


class Robot(Receiver):
    """Accepts messages of the documented form; refuses others as the real receiver does, some with status 200.

    Args:
        check: Returns the error code or word for a message, or None if the message is correct.
        answer: Makes the answer from the result of `check`.
    """

    def __init__(self, check, answer):
        super().__init__()
        self.check = check
        self.make_answer = answer
        self.wrong = None
        self.messages = []

    def answer_to(self, received):
        wrong = self.wrong or self.check(received)
        if wrong is None:
            self.messages.append(json.loads(received.body))
        return self.make_answer(wrong)


def with_errcode(wrong):
    return Answer(200, body=json.dumps({"errcode": wrong or 0, "errmsg": "no" if wrong else "ok"}).encode())


def check_wecom(received):
    message = json.loads(received.body)
    if parse_qs(urlsplit(received.path).query) != {"key": ["t0ken"]}:
        return 93000
    if message.get("msgtype") != "text":
        return 40008
    content = message.get("text", {}).get("content")
    if not content:
        return 44004
    return 45002 if len(content.encode()) > 2048 else None


def check_dingtalk(received):
    query = parse_qs(urlsplit(received.path).query)
    (timestamp,), (sign,) = query["timestamp"], query["sign"]
    digest = hmac.digest(DINGTALK_SECRET.encode(), f"{timestamp}\n{DINGTALK_SECRET}".encode(), hashlib.sha256)
    if sign != base64.b64encode(digest).decode() or abs(int(timestamp) / 1000 - time.time()) > 3600:
        return 310000
    message = json.loads(received.body)
    is_whole = message.get("msgtype") == "markdown" and set(message["markdown"]) == {"title", "text"}
    return None if is_whole and all(message["markdown"].values()) else 400105


def check_feishu(received):
    message = json.loads(received.body)
    key = f"{message['timestamp']}\n{FEISHU_SECRET}".encode()
    if message["sign"] != base64.b64encode(hmac.digest(key, b"", hashlib.sha256)).decode():
        return 19021
    if len(received.body) > 20 * 1024 or not message.get("content", {}).get("text"):
        return 9499
    return None if message.get("msg_type") == "text" else 19002


def answer_of_feishu(wrong):
    words = {None: "success", 9499: "Bad Request", 19002: "params error, msg_type need", 11232: "frequency limited"}
    body = json.dumps({"code": wrong or 0, "msg": words.get(wrong, "no"), "data": {}}).encode()
    return Answer(400 if wrong == 9499 else 200, body=body)


def check_slack(received):
    return None if json.loads(received.body).get("text") else "no_text"


def answer_of_slack(wrong):
    status = {None: 200, "no_text": 400, "invalid_payload": 400, "channel_is_archived": 410, "action_prohibited": 403}
    return Answer(status[wrong], body=(wrong or "ok").encode())


def check_scf(received):
    Webhook(SCF_SECRET).verify(received.body, received.headers)
    return None if json.loads(received.body).get("EventType") else "no EventType"


def answer_of_scf(wrong):
    if wrong == 430:  # the function has raised
        return Answer(430, body=b'{"errorCode":-1,"errorMessage":"user code exception caught","statusCode":430}')
    return Answer(200, body=json.dumps({"bad": wrong} if wrong else {"done": True}).encode())


ROBOTS = {
    "wecom": (check_wecom, with_errcode),
    "dingtalk": (check_dingtalk, with_errcode),
    "feishu": (check_feishu, answer_of_feishu),
    "slack": (check_slack, answer_of_slack),
    "scf": (check_scf, answer_of_scf),
}


def transcodes(*states, **more):
    tasks = [
        {"Status": status, "ErrCode": code, "Message": message, "Input": {"Definition": 100_020}}
        for status, code, message in states
    ]
    results = [{"Type": "Transcode", "TranscodeTask": task} for task in tasks]
    payload = {"FileId": "5285890784246869930", "FileName": "holiday", "MediaProcessResultSet": results, **more}
    return {"EventType": "ProcedureStateChanged", "ProcedureStateChangeEvent": payload}


def snapshots(*codes):
    infos = [{"ErrCode": code, "TimeOffset": 1000 * at, "Url": "http://x/1.jpg"} for at, code in enumerate(codes)]
    payload = {"TaskId": "t", "FileId": 5285890784246869930, "Definition": 10, "SnapshotInfoSet": infos}
    return {"EventType": "CreateSnapshotByTimeOffsetComplete", "SnapshotByTimeOffsetCompleteEvent": payload}


UPLOAD = {
    "EventType": "NewFileUpload",
    "FileUploadEvent": {"FileId": "5285890784246869930", "MediaBasicInfo": {"Name": "雪"}},
}
DELETION = {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["5285890784246869930", 18446744073709551616]}}
FAILED = transcodes(("SUCCESS", 0, ""), ("FAIL", 60000, "source is broken"))

SENT = {
    "wecom": (
        FAILED,
        {
            "msgtype": "text",
            "text": {
                "content": "Transcode failed: file 5285890784246869930 holiday template 100020 code 60000"
                " source is broken"
            },
        },
    ),
    "dingtalk": (
        UPLOAD,
        {"msgtype": "markdown", "markdown": {"title": "New upload", "text": "New upload: 雪 (5285890784246869930)"}},
    ),
    "feishu": (
        DELETION,
        {"msg_type": "text", "content": {"text": "Deleted: 5285890784246869930, 18446744073709551616"}},
    ),
    "slack": (
        snapshots(0, 70000, 70001),
        {"text": "Snapshots of file 5285890784246869930 failed at 1000 ms, 2000 ms"},
    ),
    "scf": (UPLOAD, UPLOAD),
}
SKIPPED = [
    ("wecom", transcodes(("SUCCESS", 0, ""))),
    ("wecom", transcodes(MediaProcessResultSet=None)),
    ("wecom", {"EventType": "ProcedureStateChanged", "ProcedureStateChangeEvent": None}),
    ("wecom", {"EventType": "ProcedureStateChanged"}),
    ("dingtalk", {"EventType": "NewFileUpload", "FileUploadEvent": None}),
    ("feishu", {"EventType": "FileDeleted"}),
    ("slack", snapshots(0, 0)),
    ("slack", {"EventType": "CreateSnapshotByTimeOffsetComplete", "SnapshotByTimeOffsetCompleteEvent": {}}),
]
REJECTED = [
    ("wecom", 45002),
    ("wecom", 44004),
    ("dingtalk", 400105),
    ("dingtalk", 430102),
    ("feishu", 9499),
    ("feishu", 19002),
    ("slack", "no_text"),
    ("slack", "invalid_payload"),
    ("scf", "it cannot be used"),
]
TRIED_AGAIN = [
    ("wecom", 45009),
    ("wecom", 93000),
    ("dingtalk", 410100),
    ("dingtalk", 310000),
    ("feishu", 11232),
    ("feishu", 19021),
    ("slack", "channel_is_archived"),
    ("slack", "action_prohibited"),
    ("scf", 430),
]


class Trial:
    """A recipe in a configuration, its stub, and the worker that calls it."""

    def __init__(self, name, robot, folder):
        self.robot = robot
        self.clock = FakeClock()
        self.in_flight = InFlight()
        for file, secret in SECRETS.items():
            (folder / file).write_text(secret + "\n")
        (folder / f"{name}_url").write_text(f"{robot.url}?key=t0ken\n" if name == "wecom" else robot.url)
        data = tomllib.loads(recipes()[name] + REST)
        data["journal"]["path"] = str(folder / "journal.db")
        self.loaded = config.from_dict(data, where="recipe", base=folder, env={})
        self.name = name
        self.sink = self.loaded.sink_classes[name](name, self.loaded.sinks[name], sink_context())
        self.router = Router(self.loaded.routes)
        self.worker = Worker(
            name=name,
            sink=self.sink,
            ledger=MemoryLedger(),
            in_flight=self.in_flight,
            queue_max_events=16,
            breaker_failures=5,
            telemetry=Telemetry(log_into([])),
            liveness=Liveness(),
            monotonic=self.clock,
        )

    def deliver(self, content):
        event = make_event(content, source="main", sub_app_id=None)
        assert self.router.route(event).sinks == (self.name,)
        self.clock.advance(3600.0)  # later than the pause after a start
        (delivery,), sent = send(self.worker, self.in_flight, [event])
        assert sent.wait(10)
        return delivery.result

    def close(self):
        self.worker.stop()
        assert self.worker.join(10)
        self.sink.close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def tried(tmp_path):
    """Takes a recipe from the page and runs it."""
    running, trials = [], []

    def try_it(name):
        running.append(running_receiver(Robot(*ROBOTS[name])))
        trials.append(Trial(name, running[-1].__enter__(), tmp_path))
        return trials[-1]

    yield try_it
    for trial in trials:
        trial.close()
    for each in running:
        each.__exit__(None, None, None)


def test_each_recipe_of_the_page_is_tried():
    assert set(recipes()) == set(ROBOTS) == set(SENT)
    assert {name for name, _ in REJECTED} == {name for name, _ in TRIED_AGAIN} == set(ROBOTS)


@pytest.mark.parametrize(("name", "code"), REJECTED)
def test_a_bad_message_becomes_a_dead_letter(tried, name, code):
    trial = tried(name)
    trial.robot.wrong = code
    assert trial.deliver(SENT[name][0]).reason is Reason.REJECTED


@pytest.mark.parametrize(("name", "code"), TRIED_AGAIN)
def test_errors_that_the_message_did_not_cause_are_tried_again(tried, name, code):
    trial = tried(name)
    trial.robot.wrong = code
    result = trial.deliver(SENT[name][0])
    assert result.reason is Reason.SINK_FAILED
    assert trial.robot.messages == []


@pytest.mark.parametrize(("name", "content"), SKIPPED)
def test_an_event_without_a_message_is_skipped(tried, name, content):
    trial = tried(name)
    assert trial.deliver(content).reason is Reason.SKIPPED
    assert trial.robot.received == []


@pytest.mark.parametrize("name", ROBOTS)
def test_the_receiver_accepts_the_message_of_each_recipe(tried, name):
    trial = tried(name)
    content, wanted = SENT[name]
    assert trial.deliver(content).reason is Reason.DELIVERED
    (message,) = trial.robot.messages
    assert {key: value for key, value in message.items() if key not in ("timestamp", "sign")} == wanted


def test_a_failed_transcode_without_a_file_name_is_sent(tried):
    trial = tried("wecom")
    content = transcodes(("FAIL", None, None), FileName=None, FileId=5285890784246869930)
    assert trial.deliver(content).reason is Reason.DELIVERED
    (message,) = trial.robot.messages
    expected = "Transcode failed: file 5285890784246869930 (no name) template 100020 code null (no message)"
    assert message["text"]["content"] == expected


def test_a_transcode_message_too_long_for_wecom_is_rejected(tried):
    trial = tried("wecom")
    result = trial.deliver(transcodes(("FAIL", 1, "x" * 3000)))
    assert result.reason is Reason.REJECTED
    assert "45002" in result.why


@pytest.mark.parametrize(("name", "limit"), [("wecom", 20), ("dingtalk", 20), ("feishu", 100), ("slack", 60)])
def test_each_recipe_keeps_to_its_receivers_limit(tried, name, limit):
    assert tried(name).sink.max_per_minute == limit
