"""What every sink promises, for each sink type that is installed."""

import errno
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import get_args

import pytest

from tests.helpers import sink_context
from tests.receiver import Answer, Receiver, running_receiver, until
from vodpoller.errors import RejectedError, TransientError
from vodpoller.events import SNAPSHOT_EVENT_TYPE, decode_json, make_event
from vodpoller.sinks.contract import Recoverable, Sink, SinkConfig
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.registry import available_sinks

SLACK_SECS = 1.5


def event(number=0, **more):
    content = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}, **more}
    return make_event(content, source="main", sub_app_id=None)


class FileHarness:
    cannot = MappingProxyType(
        {
            "hang": "a write to a disk that does not answer cannot be given up",
            "reject": "a file takes every line",
        }
    )

    def __init__(self, tmp_path):
        self.path = tmp_path / "events.jsonl"
        self.files = _FailingFiles()

    def build(self, load):
        return load("file")(
            "it", load("file").Config(type="file", path=str(self.path)), sink_context(), files=self.files
        )

    def accept(self):
        self.files.failing = False

    def fail(self):
        self.files.failing = True

    def delivered(self, count):
        return self.path.read_bytes().splitlines()

    def close(self):
        pass


class _FailingFiles(Files):
    failing = False

    def write(self, fd, data):
        if self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


class StdoutHarness:
    cannot = MappingProxyType({"reject": "a stream takes every line"})

    def __init__(self, tmp_path):
        self.reading, self.writing = os.pipe()
        self.fd = os.dup(self.writing)
        self.collected = bytearray()
        self.reads = threading.Event()
        self.reads.set()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def fileno(self):
        return self.fd

    def _read(self):
        while True:
            self.reads.wait()
            chunk = os.read(self.reading, 1 << 16)
            if not chunk:
                return
            self.collected += chunk

    def build(self, load):
        return load("stdout")("it", load("stdout").Config(type="stdout"), sink_context(), stream=self)

    def accept(self):
        os.dup2(self.writing, self.fd)
        self.reads.set()

    def fail(self):
        nobody, broken = os.pipe()
        os.close(nobody)
        os.dup2(broken, self.fd)
        os.close(broken)

    def hang(self):
        full_reading, full = os.pipe()
        os.set_blocking(full, False)
        try:
            while True:
                os.write(full, bytes(1 << 16))
        except BlockingIOError:
            pass
        os.set_blocking(full, True)
        os.dup2(full, self.fd)
        os.close(full)
        self.full_reading = full_reading

    def delivered(self, count):
        until(lambda: self.collected.count(b"\n") >= count)
        return bytes(self.collected).splitlines()

    def close(self):
        os.close(self.fd)
        os.close(self.writing)
        self.thread.join()
        os.close(self.reading)
        if hasattr(self, "full_reading"):
            os.close(self.full_reading)


class WebhookHarness:
    cannot = MappingProxyType({})

    def __init__(self, tmp_path):
        self.running = running_receiver()
        self.receiver = self.running.__enter__()

    def build(self, load):
        config = load("webhook").Config(type="webhook", url=self.receiver.url, concurrency=8)
        return load("webhook")("it", config, sink_context())

    def accept(self):
        self.receiver.answer = Answer()

    def fail(self):
        self.receiver.answer = Answer(503)

    def reject(self):
        self.receiver.answer = Answer(422)

    def hang(self):
        self.receiver.answer = Answer(hangs=True)

    def delivered(self, count):
        return [received.body for received in self.receiver.accepted]

    def close(self):
        self.running.__exit__(None, None, None)


class ExecHarness:
    cannot = MappingProxyType({})
    script = """
        case $(cat "$1/mode") in
            fail) exit 75 ;;
            reject) exit 1 ;;
            hang) exec sleep 60 ;;
        esac
        until mkdir "$1/busy" 2>/dev/null; do sleep 0.01; done
        cat >>"$1/delivered" && echo >>"$1/delivered"
        rmdir "$1/busy"
    """

    def __init__(self, tmp_path):
        self.folder = tmp_path
        self.accept()

    def build(self, load):
        command = ["sh", "-c", self.script, "sh", str(self.folder)]
        return load("exec")("it", load("exec").Config(type="exec", command=command), sink_context())

    def accept(self):
        self._mode("accept")

    def fail(self):
        self._mode("fail")

    def reject(self):
        self._mode("reject")

    def hang(self):
        self._mode("hang")

    def _mode(self, mode):
        (self.folder / "mode").write_text(mode)

    def delivered(self, count):
        return (self.folder / "delivered").read_bytes().splitlines()

    def close(self):
        pass


class Images(Receiver):
    """Serves the body of each event as its image."""

    def __init__(self):
        super().__init__()
        self.bodies = {}
        self.paths = []

    def answer_to(self, received):
        if self.answer.status != 200 or self.answer.hangs:
            return self.answer
        self.paths.append(received.path)
        return Answer(200, {"Content-Type": "image/png"}, self.bodies[received.path])


class DownloadHarness:
    cannot = MappingProxyType({})

    def __init__(self, tmp_path):
        self.root = tmp_path / "images"
        self.running = running_receiver(Images())
        self.images = self.running.__enter__()
        self.accept()

    def build(self, load):
        config = load("download").Config(
            type="download", path=f"{self.root}/{{task_id}}/{{index}}.{{ext}}", hosts=["127.0.0.1"], allow_private=True
        )
        images = self.images

        class OfAnyEvent(load("download")):
            def deliver(self, events, timeout_secs):
                (body,) = (event.body for event in events)
                path = f"/{hashlib.sha256(body).hexdigest()}/0.png"
                images.bodies[path] = body
                url = f"http://127.0.0.1:{images.server_port}{path}"
                payload = {"TaskId": path.split("/")[1], "SnapshotInfoSet": [{"ErrCode": 0, "Url": url}]}
                content = {"EventType": SNAPSHOT_EVENT_TYPE, "SnapshotByTimeOffsetCompleteEvent": payload}
                super().deliver([make_event(content, source="main", sub_app_id=None)], timeout_secs)

        return OfAnyEvent("it", config, sink_context())

    def accept(self):
        self.images.answer = Answer(200)

    def fail(self):
        self.images.answer = Answer(503)

    def reject(self):
        self.images.answer = Answer(404)

    def hang(self):
        self.images.answer = Answer(hangs=True)

    def delivered(self, count):
        return [(self.root / path.lstrip("/")).read_bytes() for path in self.images.paths]

    def close(self):
        self.running.__exit__(None, None, None)


HARNESSES = {
    "download": DownloadHarness,
    "exec": ExecHarness,
    "file": FileHarness,
    "stdout": StdoutHarness,
    "webhook": WebhookHarness,
}


def load(sink_type):
    return available_sinks()[sink_type].load()


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.system if name == "exec" else ()) for name in sorted(available_sinks())
    ]
)
def sink_type(request):
    if request.param not in HARNESSES:
        pytest.fail(f'the sink type "{request.param}" is installed and has no harness here: write one')
    return request.param


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "all_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def harness(sink_type, tmp_path):
    made = HARNESSES[sink_type](tmp_path)
    yield made
    made.close()


@pytest.fixture
def sink(harness):
    made = harness.build(load)
    if isinstance(made, Recoverable):
        assert list(made.recover(None, [None])) == []
    yield made
    made.close()


def able(harness, ability):
    if ability in harness.cannot:
        pytest.skip(harness.cannot[ability])


def deliver(sink, events, timeout_secs=10.0):
    """As a worker does: no more at once than the sink takes."""
    for start in range(0, len(events), sink.batch_events):
        sink.deliver(events[start : start + sink.batch_events], timeout_secs)


def test_the_entry_points_name_the_sinks_that_come_with_the_package():
    assert {"download", "exec", "file", "stdout", "webhook"} <= set(available_sinks())


def test_the_class_and_its_config_keep_to_the_contract(sink_type):
    sink_class = load(sink_type)
    assert issubclass(sink_class, Sink)
    assert issubclass(sink_class.Config, SinkConfig)
    fields = sink_class.Config.model_fields
    assert get_args(fields["type"].annotation) == (sink_type,)
    assert [name for name, field in fields.items() if not field.description] == []


def test_the_limits_that_it_asks_for_are_usable(sink):
    assert 1 <= sink.concurrency <= 512
    assert 1 <= sink.batch_events <= 10_000
    assert 0.1 <= sink.timeout_secs <= 300


def test_a_failure_accepts_nothing_and_the_retry_delivers_once(harness, sink):
    harness.fail()
    with pytest.raises(TransientError):
        sink.deliver([event(1)], 5.0)
    harness.accept()
    sink.deliver([event(1)], 5.0)
    assert harness.delivered(1) == [event(1).body]


def test_a_rejected_event_is_an_error_of_its_own_and_harms_no_other(harness, sink):
    able(harness, "reject")
    harness.reject()
    with pytest.raises(RejectedError):
        sink.deliver([event(1)], 5.0)
    harness.accept()
    sink.deliver([event(2)], 5.0)
    assert harness.delivered(1) == [event(2).body]


def test_a_receiver_that_hangs_costs_no_more_than_the_time_limit(harness, sink):
    able(harness, "hang")
    harness.hang()
    began = time.monotonic()
    with pytest.raises(TransientError):
        sink.deliver([event(1)], 0.3)
    assert 0.2 < time.monotonic() - began < 0.3 + SLACK_SECS
    harness.accept()
    sink.deliver([event(1)], 5.0)
    assert harness.delivered(1) == [event(1).body]


def test_after_close_nothing_is_accepted_and_closing_again_does_no_harm(harness, sink):
    sink.deliver([event(1)], 5.0)
    sink.close()
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    sink.close()
    assert harness.delivered(1) == [event(1).body]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"Title": "雪の結晶 ❄ \U0001f3bf"},
        {"Title": "half a pair: \ud83c"},
        {"Title": "a line\nand another\r\n\u2028 end \0 of it"},
        {"FileId": 18446744073709551616123, "Ratio": 0.1, "Nothing": None},
        {"Deep": [[[{"a": {"b": [1, 2, {"c": []}]}}]]]},
    ],
    ids=["plain", "unicode", "lone surrogate", "line ends", "big numbers", "nested"],
)
def test_a_body_arrives_once_and_json_equal(harness, sink, more):
    sent = event(1, **more)
    sink.deliver([sent], 10.0)
    assert [decode_json(body.decode()) for body in harness.delivered(1)] == [sent.content]


def test_a_body_of_5_megabytes_arrives_whole(harness, sink):
    sent = event(1, Text="0123456789abcdef" * (5 * 65_536))
    sink.deliver([sent], 20.0)
    assert harness.delivered(1) == [sent.body]


def test_events_arrive_in_the_order_of_the_call(harness, sink):
    sent = [event(number) for number in range(50)]
    deliver(sink, sent)
    assert harness.delivered(50) == [each.body for each in sent]


def test_as_many_threads_as_it_asks_for_deliver_at_once(harness, sink):
    sent = [[event(thread * 100 + number) for number in range(25)] for thread in range(sink.concurrency)]
    with ThreadPoolExecutor(sink.concurrency) as threads:
        list(threads.map(lambda events: deliver(sink, events), sent))
    bodies = [each.body for events in sent for each in events]
    assert sorted(harness.delivered(len(bodies))) == sorted(bodies)


def test_reopening_while_it_delivers_loses_and_repeats_nothing(harness, sink):
    done = threading.Event()

    def reopen():
        while not done.wait(0.001):
            sink.reopen()

    reopening = threading.Thread(target=reopen)
    reopening.start()
    try:
        for number in range(40):
            sink.deliver([event(number)], 10.0)
    finally:
        done.set()
        reopening.join()
    assert [json.loads(body)["FileUploadEvent"]["FileId"] for body in harness.delivered(40)] == list(
        map(str, range(40))
    )


def test_its_position_is_that_of_a_file_or_none_at_all(harness, sink):
    if not isinstance(sink, Recoverable):
        pytest.skip("it has no position")
    before = sink.position()
    sink.deliver([event(1)], 5.0)
    after = sink.position()
    assert (after.inode, after.offset_bytes) == (before.inode, before.offset_bytes + len(event(1).body) + 1)
