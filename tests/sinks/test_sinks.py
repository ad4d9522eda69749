"""The promises of every sink, for each installed sink type."""

import errno
import hashlib
import os
import threading
from dataclasses import replace
from types import MappingProxyType

import pytest

from tests.polling import until
from tests.receiver import Answer, Receiver, running_receiver
from tests.sinks.sql_harnesses import SqliteHarness
from tests.tencent_api import SECRET_ID, SECRET_KEY, TencentApi
from vodpoller.events.event import make_event
from vodpoller.events.snapshots import SNAPSHOT_EVENT_TYPE
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.registry import available_sinks
from vodpoller.testing import SinkHarness, event, sink_conformance, vod_simulator
from vodpoller.vod.credentials import Credentials

__all__ = ["vod_simulator"]  # a fixture


class FileHarness(SinkHarness):
    sink_type = "file"
    cannot = MappingProxyType(
        {
            "hang": "a write to a disk that does not answer cannot be cancelled",
            "refuse": "a file accepts every line",
            "reject": "a file accepts every line",
        }
    )

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.path = tmp_path / "events.jsonl"
        self.files = _FailingFiles()

    def build(self, context):
        return self.sink_class(
            "it", self.sink_class.Config(type="file", path=str(self.path)), context, files=self.files
        )

    def accept(self):
        self.files.failing = False

    def fail(self):
        self.files.failing = True

    def delivered(self, count):
        return self.path.read_bytes().splitlines()


class _FailingFiles(Files):
    failing = False

    def write(self, fd, data):
        if self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


class StdoutHarness(SinkHarness):
    sink_type = "stdout"
    cannot = MappingProxyType(dict.fromkeys(("refuse", "reject"), "a stream accepts every line"))

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
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

    def build(self, context):
        return self.sink_class("it", self.sink_class.Config(type="stdout"), context, stream=self)

    def accept(self):
        os.dup2(self.writing, self.fd)
        self.reads.set()

    def fail(self):
        reading, broken = os.pipe()
        os.close(reading)
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


class WebhookHarness(SinkHarness):
    sink_type = "webhook"
    cannot = MappingProxyType({"refuse": "it takes one event at a time"})

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.running = running_receiver()
        self.receiver = self.running.__enter__()

    def build(self, context):
        config = self.sink_class.Config(type="webhook", url=self.receiver.url, concurrency=8)
        return self.sink_class("it", config, context)

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


class ExecHarness(SinkHarness):
    sink_type = "exec"
    cannot = MappingProxyType({"refuse": "it takes one event at a time"})
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
        super().__init__(tmp_path)
        self.folder = tmp_path
        self.accept()

    def build(self, context):
        command = ["sh", "-c", self.script, "sh", str(self.folder)]
        return self.sink_class("it", self.sink_class.Config(type="exec", command=command), context)

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


class DownloadHarness(SinkHarness):
    sink_type = "download"
    cannot = MappingProxyType({"refuse": "it takes one event at a time"})

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.root = tmp_path / "images"
        self.running = running_receiver(Images())
        self.images = self.running.__enter__()
        self.accept()

    def build(self, context):
        config = self.sink_class.Config(
            type="download", path=f"{self.root}/{{task_id}}/{{index}}.{{ext}}", hosts=["127.0.0.1"], allow_private=True
        )
        images = self.images

        class OfAnyEvent(self.sink_class):
            def deliver(self, events, timeout_secs):
                (body,) = (event.body for event in events)
                path = f"/{hashlib.sha256(body).hexdigest()}/0.png"
                images.bodies[path] = body
                url = f"http://127.0.0.1:{images.server_port}{path}"
                payload = {"TaskId": path.split("/")[1], "SnapshotInfoSet": [{"ErrCode": 0, "Url": url}]}
                content = {"EventType": SNAPSHOT_EVENT_TYPE, "SnapshotByTimeOffsetCompleteEvent": payload}
                super().deliver([make_event(content, source="main", sub_app_id=None)], timeout_secs)

        return OfAnyEvent("it", config, context)

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


class TencentHarness(SinkHarness):
    sink_type = "tencent"
    cannot = MappingProxyType({"refuse": "it takes one event at a time"})

    def __init__(self, tmp_path):
        super().__init__(tmp_path)
        self.running = running_receiver(TencentApi())
        self.api = self.running.__enter__()

    def build(self, context):
        config = self.sink_class.Config(
            type="tencent",
            service="eb",
            version="2021-04-16",
            action="PutEvents",
            params="{Event: @}",
            endpoint=self.api.endpoint,
            requests_per_sec=10_000.0,
        )
        return self.sink_class("it", config, replace(context, credentials=lambda: Credentials(SECRET_ID, SECRET_KEY)))

    def accept(self):
        self.api.answer, self.api.refuse_with = None, None

    def fail(self):
        self.api.refuse_with = "InternalError"

    def reject(self):
        self.api.refuse_with = "InvalidParameterValue"

    def hang(self):
        self.api.answer = Answer(hangs=True)

    def delivered(self, count):
        return [call.body.removeprefix(b'{"Event":').removesuffix(b"}") for call in self.api.calls]

    def close(self):
        self.running.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "all_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


TestDownload = sink_conformance(DownloadHarness)
TestExec = sink_conformance(ExecHarness)
TestFile = sink_conformance(FileHarness)
TestSqlite = sink_conformance(SqliteHarness)
TestStdout = sink_conformance(StdoutHarness)
TestTencent = sink_conformance(TencentHarness)
TestWebhook = sink_conformance(WebhookHarness)


def test_each_installed_sink_passes_the_suite():
    """A new sink needs a harness here or in `test_sinks_of_servers.py`."""
    assert set(available_sinks()) == {
        "download",
        "exec",
        "file",
        "mysql",
        "postgresql",
        "sqlite",
        "stdout",
        "tencent",
        "webhook",
    }


def test_the_simulator_of_a_test_answers_and_its_queue_is_empty(vod_simulator):
    assert vod_simulator.url.startswith("http://127.0.0.1:")
    assert vod_simulator.feed([event(1).body]) == 1
    assert vod_simulator.stats()["fed"] == 1
