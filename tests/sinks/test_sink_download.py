"""Images become files; no event, host or disk can make the sink do anything else."""

import errno
import fcntl
import hashlib
import os
import socket
import stat
import threading
import time
import tracemalloc
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from tests.helpers import named, sink_context
from tests.processes import cannot_run
from tests.receiver import black_hole
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import make_event
from vodpoller.sinks.download.config import DownloadConfig
from vodpoller.sinks.download.fetching import is_public
from vodpoller.sinks.download.path_template import safe_name
from vodpoller.sinks.download.sink import DownloadSink

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 300
SLACK_SECS = 1.5


def event(*images, file_id="387702", task_id="task-1", definition=10, **more):
    taken = {"TaskId": task_id, "FileId": file_id, "Definition": definition, "SnapshotInfoSet": list(images)}
    content = {"EventType": "CreateSnapshotByTimeOffsetComplete", "SnapshotByTimeOffsetCompleteEvent": taken, **more}
    return make_event(content, source="main", sub_app_id=None)


def image(url, offset=1000, err_code=0):
    return {"ErrCode": err_code, "TimeOffset": offset, "Url": url}


# --- a host of images ---


class Host(ThreadingHTTPServer):
    """Answers each path with the entry of `pages`: bytes, or a function that gets the handler."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages = {}
        self.asked = []
        self.stopping = threading.Event()

    def url(self, path="/1.png", host="127.0.0.1"):
        return f"http://{host}:{self.server_port}{path}"

    def serves(self, path, page=PNG):
        self.pages[path.partition("?")[0]] = page
        return self.url(path)

    def handle_error(self, request, client_address):
        pass  # some tests have clients that close the connection early


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers), self.client_address))
        page = self.server.pages.get(self.path.partition("?")[0], status(404))
        with suppress(OSError):
            if callable(page):
                page(self)
            else:
                self.answer(200, page)

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def status(code, body=b"", **headers):
    return lambda handler: handler.answer(code, body, **headers)


def redirect(to, code=302):
    return status(code, b"x" * 1000, Location=to)


def endless(handler):
    handler.answer(200, b"", Content_Length=None)
    while not handler.server.stopping.is_set():
        handler.wfile.write(bytes(65_536))


def stalls(handler):
    handler.answer(200, b"half", Content_Length="1000")
    handler.server.stopping.wait(20)
    handler.close_connection = True


def dribbles(handler):
    handler.answer(200, b"", Content_Length="100000")
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"x")


def ends_too_early(handler):
    handler.answer(200, PNG[:100], Content_Length="1000")
    handler.close_connection = True


def ends_too_late(handler):
    handler.answer(200, PNG[:100] + b"y" * 500, Content_Length="100")
    handler.close_connection = True


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def host():
    server = Host()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "srv" / "snapshots"


@pytest.fixture
def opened(root, log):
    sinks = []

    def open_it(template="{file_id}/{time_offset_ms}.{ext}", *, edges=None, **more):
        settings = {"hosts": ["127.0.0.1", "*.example"], "allow_private": True, **more}
        config = DownloadConfig(type="download", path=f"{root}/{template}", **settings)
        sinks.append(DownloadSink("images", config, sink_context(log), **(edges or {})))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.fixture
def files(root, tmp_path):
    """All files below the test's folder, by their path relative to the root; those outside begin with '../'."""

    def look():
        return {os.path.relpath(path, root): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    return look


def failure_of(sink, sent, kind, timeout_secs=10.0):
    with pytest.raises(kind) as excinfo:
        sink.deliver([sent], timeout_secs)
    assert excinfo.type is kind
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


# --- configuration ---


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/srv/{file_id}/{nothing}.jpg", "the field {nothing} does not exist (there are: {file_id}, {task_id}"),
        ("/srv/{file_id}/{}.jpg", "the field {} does not exist"),
        ("/srv/{file_id}/{0}.jpg", "the field {0} does not exist"),
        ("/srv/{file_id.__class__}/{index}.jpg", "the field {file_id.__class__} does not exist"),
        ("/srv/{file_id[0]}/{index}.jpg", "the field {file_id[0]} does not exist"),
        ("/srv/{file_id!r}/{index}.jpg", "does not exist"),
        ("/srv/{file_id:>9999999}/{index}.jpg", "does not exist"),
        ("/srv/{file_id/{index}.jpg", "braces"),
        ("/srv/{file_id}/{index", "braces"),
        ("/srv/file_id}/{index}", "braces"),
        ("/srv/snapshots/image.jpg", "all events would go to the same file"),
        ("/srv/{index}.{ext}", "all events would go to the same file (it needs {file_id} or {task_id} or {key}"),
        ("/srv/{file_id}.{ext}", "all images of an event would go to the same file"),
        ("/srv/{key}/{definition}", "all images of an event would go to the same file"),
        ("{file_id}/{index}", "a folder before the first field"),
        ("/{file_id}/{index}", "a folder before the first field"),
        ("/snap-{file_id}/{index}", "a folder before the first field"),
        ("/srv/{file_id}/../{index}", "may be empty, . or .."),
        ("/srv/{file_id}/./{index}", "may be empty, . or .."),
        ("/srv/{file_id}//{index}", "may be empty, . or .."),
        ("/srv/{file_id}/{index}/", "may be empty, . or .."),
        ("/srv/{file_id}/{index}\0", "NUL"),
        ("/srv/{file_id}-{task_id}-{key}-{index}", "longer than 255 bytes"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(path, expected):
    with pytest.raises(ValidationError) as excinfo:
        DownloadConfig(type="download", path=path, hosts=["*"])
    (error,) = excinfo.value.errors()
    assert error["loc"] == ("path",)
    assert expected in error["msg"]


@pytest.mark.parametrize(
    "path",
    [
        "/srv/snapshots/{file_id}/{time_offset_ms}.{ext}",
        "/srv/snapshots/{file_id}-{task_id}-{time_offset_ms}.{ext}",
        "relative/{key}/{definition}/{index}",
        "/srv/{{braces}}/{key}-{index}.jpg",
    ],
)
def test_a_path_that_can_be_used_is_accepted(path):
    assert DownloadConfig(type="download", path=path, hosts=["*"]).path == path


@pytest.mark.parametrize(
    "more",
    [
        {"hosts": []},
        {"hosts": [""]},
        {"hosts": ["https://a.example"]},
        {"hosts": ["a.example/path"]},
        {"hosts": ["a.example:80"]},
        {"max_bytes": 0},
        {"timeout_secs": 0.09},
        {"concurrency": 0},
        {"allow_private": "yes"},
        {"max_byte": 1},
    ],
)
def test_values_that_cannot_be_used_are_refused(more):
    with pytest.raises(ValidationError):
        DownloadConfig(type="download", path="/srv/{key}/{index}", **{"hosts": ["a.example"], **more})


def test_hosts_must_be_given():
    with pytest.raises(ValidationError) as excinfo:
        DownloadConfig(type="download", path="/srv/{key}/{index}")
    assert [error["loc"] for error in excinfo.value.errors()] == [("hosts",)]


def test_a_folder_that_cannot_be_made_is_a_config_error(opened, root):
    root.parent.parent.mkdir(exist_ok=True)
    root.parent.write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"sinks\.images\.path: .*: Not a directory"):
        opened()


@pytest.mark.parametrize("variable", ["", "SSL_CERT_FILE"])
def test_images_are_downloaded_from_a_host_with_a_private_ca(opened, host, files, certificate, monkeypatch, variable):
    host.socket = certificate.context().wrap_socket(host.socket, server_side=True)
    sent = event(image(host.serves("/1.png").replace("http:", "https:")))
    assert "cannot be trusted: self-signed" in failure_of(opened(), sent, TransientError, timeout_secs=5.0)
    if variable:
        monkeypatch.setenv(variable, str(certificate.path))
    opened(ca_file=None if variable else str(certificate.path)).deliver([sent], 5.0)
    assert list(files()) == ["387702/1000.png"]


@pytest.mark.parametrize("digits", [20, 5000])
def test_an_announced_length_of_many_digits_is_too_long(opened, host, digits):
    sent = event(image(host.serves("/1.png", status(200, b"", Content_Length="9" * digits))))
    assert "max_bytes" in failure_of(opened(), sent, RejectedError, timeout_secs=5.0)


def interim(handler):
    handler.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    handler.answer(200, PNG)


def negative_chunk(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nx")
    handler.close_connection = True


def test_an_interim_answer_is_not_the_image(opened, host, files):
    opened().deliver([event(image(host.serves("/1.png", interim)), image(host.serves("/2.png"), 2000))], 5.0)
    assert files() == {"387702/1000.png": PNG, "387702/2000.png": PNG}


def test_a_body_of_broken_chunks_is_transient(opened, host, files):
    sent = event(image(host.serves("/1.png", negative_chunk)))
    assert "sent a chunk of -5 bytes" in failure_of(opened(), sent, TransientError, timeout_secs=5.0)
    assert files() == {}


def test_a_ca_bundle_that_does_not_exist_is_a_config_error(opened, monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nothing.pem"))
    with pytest.raises(ConfigError, match=r"nothing\.pem, which does not exist"):
        opened()


def test_a_probe_creates_nothing(root, tmp_path):
    config = DownloadConfig(type="download", path=f"{root}/{{key}}/{{index}}", hosts=["*"])
    assert DownloadSink.probe("images", config, sink_context()) == f"{root} can be created"
    assert list(tmp_path.iterdir()) == []
    root.mkdir(parents=True)
    assert DownloadSink.probe("images", config, sink_context()) == f"{root} can be written"


def test_a_probe_reports_a_file_at_the_path_of_a_folder(root):
    root.parent.write_text("a file in the way")
    config = DownloadConfig(type="download", path=f"{root}/{{key}}/{{index}}", hosts=["*"])
    with pytest.raises(ConfigError, match=r"sinks\.images\.path: .*: Not a directory"):
        DownloadSink.probe("images", config, sink_context())


# --- what is saved ---


def test_the_images_of_an_event_become_files(opened, host, files):
    sink = opened()
    sent = event(image(host.serves("/a/1.png"), 1000), image(host.serves("/a/2.JPG", b"two"), 2000))
    sink.deliver([sent], 10.0)
    assert files() == {"387702/1000.png": PNG, "387702/2000.jpg": b"two"}


def test_every_field_can_be_used(opened, host, files):
    sent = event(image(host.serves("/1.webp"), 1500))
    opened("{definition}/{file_id}/{task_id}/{key}/{index}-{time_offset_ms}.{ext}").deliver([sent], 10.0)
    assert list(files()) == [f"10/387702/task-1/{sent.key.hex()}/0-1500.webp"]


def test_files_and_folders_are_not_readable_by_others(opened, host, root):
    opened().deliver([event(image(host.serves("/1.png")))], 10.0)
    assert (root / "387702").stat().st_mode & 0o007 == 0
    assert (root / "387702" / "1000.png").stat().st_mode & 0o117 == 0


@pytest.mark.parametrize(
    ("path", "content_type", "extension"),
    [
        ("/1.PNG?sign=abc.jpg", "image/jpeg", "png"),
        ("/1.jpeg", None, "jpeg"),
        ("/1.php", "image/webp", "webp"),
        ("/1", "image/JPEG; charset=binary", "jpg"),
        ("/1.sh", "application/octet-stream", "bin"),
        ("/1.", None, "bin"),
        ("/png", "image/../../x", "bin"),
    ],
)
def test_the_extension_is_one_of_images(opened, host, files, path, content_type, extension):
    url = host.serves(path, status(200, PNG, Content_Type=content_type))
    opened().deliver([event(image(url))], 10.0)
    assert files() == {f"387702/1000.{extension}": PNG}


def test_an_existing_image_is_not_downloaded_again(opened, host, files):
    sink = opened()
    sent = event(image(host.serves("/1.png")), image(host.serves("/2", status(200, b"2", Content_Type="image/gif")), 2))
    sink.deliver([sent], 10.0)
    host.pages = {"/2": status(200, b"other", Content_Type="image/gif")}
    sink.deliver([sent], 10.0)
    assert files() == {"387702/1000.png": PNG, "387702/2.gif": b"2"}
    # The name of the second one depends on the head of the answer.
    assert [path for path, _, _ in host.asked] == ["/1.png", "/2", "/2"]


def test_other_images_are_saved_and_a_retry_loads_only_failed_ones(opened, host, files):
    sent = event(*(image(host.url(f"/{n}.png"), n) for n in range(3)))
    host.serves("/0.png", status(503))
    host.serves("/2.png", b"two")
    sink = opened()
    message = failure_of(sink, sent, TransientError)
    assert message.startswith("2 of 3 images were not saved: ")
    assert "/0.png answered 503" in message
    host.serves("/0.png", b"zero")
    assert "/1.png answered 404" in failure_of(sink, sent, RejectedError)
    assert files() == {"387702/0.png": b"zero", "387702/2.png": b"two"}
    assert [path for path, _, _ in host.asked].count("/2.png") == 1


def test_two_images_with_the_same_path_are_an_error(opened, host, files):
    sent = event(image(host.serves("/1.png", b"one"), None), image(host.serves("/2.png", b"two"), None))
    message = failure_of(opened(), sent, RejectedError)
    assert "two images of the event would go to" in message
    assert "{index}" in message
    opened("{file_id}/{index}.{ext}").deliver([sent], 10.0)
    assert {"387702/0.png", "387702/1.png"} <= set(files())


def test_an_image_that_is_listed_twice_is_downloaded_once(opened, host):
    url = host.serves("/1.png")
    opened().deliver([event(image(url), image(url))], 10.0)
    assert len(host.asked) == 1


# --- files of other events ---


@pytest.fixture
def skipped(lines):
    def found():
        return named(lines, "image.skipped")

    return found


def without_attributes(*_args, **_more):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.fixture(params=["with attributes", "without attributes"])
def attributes(request, monkeypatch, root):
    """File systems with and without extended attributes."""
    if request.param == "without attributes":
        monkeypatch.setattr(os, "setxattr", without_attributes)
        monkeypatch.setattr(os, "getxattr", without_attributes)
        return False
    root.mkdir(parents=True)
    try:
        os.setxattr(root, "user.vodpoller.key", b"x")
    except OSError:
        cannot_run("the file system of the temporary folder has no extended attributes")
    return True


@pytest.mark.parametrize(
    "other", [{"definition": 20}, {"task_id": "task-2"}, {"definition": 20, "task_id": "task-2", "Extra": 1}]
)
def test_an_image_whose_path_another_event_has_is_reported(opened, host, files, skipped, attributes, root, other):
    sink = opened()
    first, second = event(image(host.serves("/1.png"))), event(image(host.serves("/2.png", b"two")), **other)
    sink.deliver([first], 10.0)
    assert skipped() == []
    for _ in range(3):
        sink.deliver([second], 10.0)
    assert files() == {"387702/1000.png": PNG}
    (log_line,) = skipped()
    assert log_line["key"] == second.key.hex()
    assert log_line["held_by"] == first.key.hex()
    assert log_line["path"] == str(root / "387702" / "1000.png")
    assert "{definition} and {task_id}" in log_line["hint"]


@pytest.mark.parametrize("path", ["/1.png", "/1"])
def test_an_event_s_own_files_are_not_reported(opened, host, skipped, attributes, path):
    host.serves(path, status(200, PNG, Content_Type="image/png"))
    sent = event(image(host.url(path)), image(host.url("/2.png"), 2000))
    sink = opened()
    for _ in range(3):
        with pytest.raises(RejectedError):
            sink.deliver([sent], 10.0)
    assert skipped() == []


def test_an_event_s_own_files_are_known_after_a_restart(opened, host, skipped, attributes):
    sent = event(image(host.serves("/1.png")))
    opened().deliver([sent], 10.0)
    opened().deliver([sent], 10.0)
    assert [log_line["held_by"] for log_line in skipped()] == ([] if attributes else ["unknown"])


def test_a_path_with_the_key_has_no_files_of_other_events(opened, host, skipped, monkeypatch):
    monkeypatch.setattr(os, "getxattr", without_attributes)
    sent = event(image(host.serves("/1.png")))
    opened("{key}/{index}.{ext}").deliver([sent], 10.0)
    opened("{key}/{index}.{ext}").deliver([sent], 10.0)
    assert skipped() == []


@pytest.mark.parametrize("number", [2, 4])
def test_one_of_several_events_gets_the_path_the_others_are_reported(opened, host, files, skipped, number):
    together = threading.Barrier(number)

    def served(body):
        def answer(handler):
            together.wait(20)
            handler.answer(200, body)

        return answer

    sent = [event(image(host.serves(f"/{n}.png", served(b"image %d" % n))), task_id=f"task-{n}") for n in range(number)]
    sink = opened()
    threads = [threading.Thread(target=sink.deliver, args=([each], 30.0)) for each in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((place, content),) = files().items()
    assert place == "387702/1000.png"
    winner = sent[int(content.split()[1])].key.hex()
    assert {log_line["held_by"] for log_line in skipped()} == {winner}
    assert {log_line["key"] for log_line in skipped()} == {each.key.hex() for each in sent} - {winner}


# --- file systems that lack a function ---


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_synced_are_a_warning_once(opened, host, files, lines, monkeypatch, number):
    sync = os.fsync

    def refuse_folders(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        sync(fd)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    opened().deliver([event(image(host.serves("/1.png")))], 10.0)
    assert files() == {"387702/1000.png": PNG}
    (log_line,) = named(lines, "config.warning")
    assert log_line["message"].startswith("sinks.images.path: ")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF])
def test_without_locks_images_are_saved_and_partial_files_are_kept(opened, host, root, monkeypatch, number):
    def refuse(_fd, _kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (root / "387702").mkdir(parents=True)
    left = root / "387702" / f".vodpoller-{'0' * 16}.part"
    left.write_bytes(b"half")
    opened().deliver([event(image(host.serves("/1.png")))], 10.0)
    assert (root / "387702" / "1000.png").read_bytes() == PNG
    assert left.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
def test_a_disk_error_at_the_start_is_transient(opened, monkeypatch, number):
    def refuse(*_args, **_more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(TransientError, match=r"sinks\.images\.path: "):
        opened()


# --- what is not saved ---


def test_a_snapshot_that_vod_failed_to_take_is_logged_and_skipped(opened, host, files, skipped):
    sent = event(image("", 500, err_code=70_000), image(host.serves("/1.png")), image("x", 700, err_code="Bad"))
    opened().deliver([sent], 10.0)
    assert list(files()) == ["387702/1000.png"]
    first, second = skipped()
    assert first["level"] == second["level"] == "warning"
    assert first["key"] == second["key"] == sent.key.hex()
    assert "at 500 ms (ErrCode 70000)" in first["message"]
    assert "ErrCode Bad" in second["message"]


@pytest.mark.parametrize("sent", [event(), event(image("", 500, err_code=1))])
def test_an_event_without_an_image_is_accepted_with_a_log_line(opened, files, skipped, sent):
    opened().deliver([sent], 10.0)
    assert files() == {}
    assert len(skipped()) == 1


def test_very_long_event_types_are_not_kept_in_memory(opened, lines):
    sink = opened()
    tracemalloc.start()
    try:
        for number in range(20):
            content = {"EventType": f"{number}" + "x" * 1_000_000}
            sink.deliver([make_event(content, source="main", sub_app_id=None)], 10.0)
        del content
        assert len(lines) == 20
        lines.clear()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


def test_events_of_another_type_are_accepted_and_logged_once(opened, files, skipped):
    sink = opened()
    for number in range(5):
        sink.deliver([make_event({"EventType": "FileDeleted", "N": number}, source="main", sub_app_id=None)], 10.0)
    assert files() == {}
    (log_line,) = skipped()
    assert log_line["event_type"] == "FileDeleted"
    assert "'FileDeleted'" in log_line["message"]


# --- what a host may answer ---


@pytest.mark.parametrize(
    ("page", "kind", "expected"),
    [
        (status(404), RejectedError, "answered 404 Not Found"),
        (status(410), RejectedError, "answered 410 Gone"),
        (status(400), TransientError, "answered 400"),
        (status(403), TransientError, "answered 403 Forbidden"),
        (status(500), TransientError, "answered 500"),
        (status(204, Content_Length=None), TransientError, "answered 204"),
        (status(206, PNG), TransientError, "answered 206"),
        (status(304, Content_Length=None), TransientError, "answered 304"),
        (status(302), TransientError, "answered 302"),
        (status(200, b"<html>", Content_Type="text/html; charset=utf-8"), RejectedError, "is a web page (text/html)"),
        (status(200, PNG, Content_Encoding="gzip"), TransientError, "sent a compressed answer"),
        (status(200, b""), TransientError, "sent an empty answer"),
        (status(200, b"", Content_Length=str(10**10)), RejectedError, "larger than sinks.images.max_bytes = 100000"),
        (endless, RejectedError, "larger than sinks.images.max_bytes = 100000"),
        (stalls, TransientError, "did not answer within 0.5 s"),
        (dribbles, TransientError, "did not answer within 0.5 s"),
        (ends_too_early, TransientError, "closed the connection without a whole answer"),
        (status(200, PNG, Content_Length="5, 6"), TransientError, "127.0.0.1"),
    ],
)
def test_an_answer_that_is_not_an_image_leaves_no_file(opened, host, files, page, kind, expected):
    sent = event(image(host.serves("/1.png?sign=hunter2", page)))
    began = time.monotonic()
    message = failure_of(opened(max_bytes=100_000), sent, kind, timeout_secs=0.5)
    assert time.monotonic() - began < 0.5 + SLACK_SECS
    assert expected in message
    assert f"{host.url()} " in message
    assert "hunter2" not in message
    assert files() == {}


def test_bytes_beyond_the_announced_length_are_ignored(opened, host, files):
    sink = opened()
    sink.deliver([event(image(host.serves("/1.png", ends_too_late)), image(host.serves("/2.png"), 2))], 10.0)
    assert files() == {"387702/1000.png": PNG[:100], "387702/2.png": PNG}


def test_an_image_of_exactly_the_maximum_length_is_saved(opened, host, files):
    opened(max_bytes=len(PNG)).deliver([event(image(host.serves("/1.png")))], 10.0)
    assert files() == {"387702/1000.png": PNG}
    message = failure_of(opened("{file_id}/b{index}", max_bytes=len(PNG) - 1), event(image(host.url())), RejectedError)
    assert "max_bytes" in message


def test_the_time_limit_applies_to_all_images_together(opened, host):
    def slow(handler):
        handler.server.stopping.wait(0.2)
        handler.answer(200, PNG)

    sent = event(*(image(host.serves(f"/{n}.png", slow), n) for n in range(20)))
    began = time.monotonic()
    message = failure_of(opened(), sent, TransientError, timeout_secs=0.5)
    assert time.monotonic() - began < 0.5 + SLACK_SECS
    assert "of 20 images were not saved" in message
    assert "the time limit of 0.5 s for the event is over" in message
    assert len(host.asked) <= 4


def test_a_host_that_drops_packets_fails_at_the_time_limit(opened):
    with black_hole() as port:
        sent = event(image(f"http://127.0.0.1:{port}/1.png"))
        assert "could not be reached within 0.3 s" in failure_of(opened(), sent, TransientError, timeout_secs=0.3)


def test_retry_after_is_passed_on(opened, host):
    sent = event(
        image(host.serves("/1.png", status(503, Retry_After="7"))), image(host.serves("/2.png", status(500)), 2)
    )
    with pytest.raises(TransientError) as excinfo:
        opened().deliver([sent], 10.0)
    assert excinfo.value.retry_after_secs == 7


def test_no_credentials_or_cookies_are_sent(opened, host, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password hunter2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    first = status(302, Location="/2.png", Set_Cookie="session=1; Path=/")
    host.serves("/2.png", status(200, PNG, Set_Cookie="session=2; Path=/"))
    opened().deliver([event(image(host.serves("/1.png", first)), image(host.serves("/3.png"), 3))], 10.0)
    assert len(host.asked) == 3
    for _, headers, _ in host.asked:
        assert {name.lower() for name in headers} == {"host", "user-agent", "accept", "accept-encoding"}
        assert headers["Accept-Encoding"] == "identity"


def test_connections_are_kept(opened, host):
    opened().deliver([event(*(image(host.serves(f"/{n}.png"), n) for n in range(5)))], 10.0)
    assert len({peer for _, _, peer in host.asked}) == 1


# --- where images may come from ---


class Resolver:
    def __init__(self, **names):
        self.names = names
        self.asked = []

    def __call__(self, host, port, **kwargs):
        self.asked.append(host)
        addresses = self.names.get(host.partition(".")[0], [host])
        if any(":" in address for address in addresses):
            return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)) for address in addresses]
        return socket.getaddrinfo(addresses[0], port, type=socket.SOCK_STREAM)


PRIVATE = [
    "127.0.0.1",
    "169.254.169.254",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "100.64.0.1",
    "0.0.0.0",
    "255.255.255.255",
    "224.0.0.1",
    "240.0.0.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "127.1",
]
PRIVATE_6 = [
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fec0::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b:1::a00:1",
    "2002:7f00:1::",
    "2001:0:a00:1::1",
    "::127.0.0.1",
]


@pytest.mark.parametrize("address", [*PRIVATE[:10], *PRIVATE_6])
def test_addresses_that_are_not_public_are_recognised(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "119.29.29.29", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public_are_recognised(address):
    assert is_public(address)


@pytest.mark.parametrize("address", [*PRIVATE, *(f"[{address}]" for address in PRIVATE_6)])
@pytest.mark.parametrize("how", ["url", "redirect"])
def test_no_connection_is_made_to_an_address_that_is_not_public(opened, host, files, monkeypatch, address, how):
    """Neither from an event's URL nor from a redirect of a public host; the test declares the host public."""
    connected = connections(monkeypatch)
    declared = ["127.0.0.1"]
    monkeypatch.setattr("vodpoller.sinks.download.fetching.is_public", lambda ip: ip in declared or is_public(ip))
    url = f"http://{address}:{host.server_port}/1.png"
    if how == "redirect":
        start = host.serves("/start.png", lambda handler: (declared.clear(), redirect(url)(handler)))
    else:
        start = url
        declared.clear()
    message = failure_of(opened(hosts=["*"], allow_private=False), event(image(start)), RejectedError)
    assert "no connection may be made" in message
    assert "sinks.images.allow_private" in message
    assert len(connected) == (1 if how == "redirect" else 0)
    assert files() == {}


def connections(monkeypatch):
    """Records the addresses to which sockets connect."""
    connected = []

    class Socket(socket.socket):
        def connect(self, address):
            connected.append(address[0])
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Socket)
    return connected


@pytest.mark.parametrize("address", [*PRIVATE[:10], *PRIVATE_6])
def test_no_connection_is_made_to_a_name_with_a_private_address(opened, monkeypatch, address):
    connected = connections(monkeypatch)
    sink = opened(allow_private=False, edges={"resolve": Resolver(images=[address])})
    message = failure_of(sink, event(image("http://images.example/1.png")), RejectedError)
    assert "http://images.example/1.png is at " in message
    assert connected == []


def test_the_address_that_was_checked_is_the_one_connected_to(opened, host, monkeypatch):
    connected = connections(monkeypatch)
    answers = iter([["1.2.3.4"], ["127.0.0.1"]])

    def resolve(name, port, **kwargs):
        return socket.getaddrinfo(next(answers)[0], port, type=socket.SOCK_STREAM)

    sink = opened(allow_private=False, edges={"resolve": resolve})
    with monkeypatch.context() as patched:
        patched.setattr("socket.socket.connect", lambda sock, address: connected.append(address[0]) or refuse())
        failure_of(sink, event(image(host.url(host="images.example"))), TransientError)
    assert connected == ["1.2.3.4"]
    assert len(list(answers)) == 1


def refuse():
    raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.mark.parametrize(
    "url",
    [
        "http://elsewhere.test/1.png",
        "http://example/1.png",
        "http://images.example.test/1.png",
        "http://images.example.test\\@images.example/1.png",
        "http://elsewhere.test/images.example/1.png",
        "http://elsewhere.test#images.example/1.png",
        "http://elsewhere.test?images.example/1.png",
    ],
)
@pytest.mark.parametrize("how", ["url", "redirect"])
def test_no_other_host_is_contacted(opened, host, files, url, how):
    resolver = Resolver()
    start = host.serves("/start.png", redirect(url)) if how == "redirect" else url
    sink = opened(edges={"resolve": resolver})
    message = failure_of(sink, event(image(start)), RejectedError)
    assert "its host is not in sinks.images.hosts" in message or "credentials" in message
    assert resolver.asked == (["127.0.0.1"] if how == "redirect" else [])
    assert files() == {}


@pytest.mark.parametrize("name", ["images.example", "IMAGES.Example", "a.b.example", "images.example."])
def test_hosts_are_globs_of_names_in_any_case(opened, host, files, name):
    host.serves("/1.png")
    sink = opened(hosts=["*.EXAMPLE"], edges={"resolve": lambda *args, **kwargs: local(host)})
    sink.deliver([event(image(host.url(host=name)))], 10.0)
    assert files() == {"387702/1000.png": PNG}


def local(host):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", host.server_port))]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "ftp://127.0.0.1/1.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "httpx://127.0.0.1/1.png",
        "//127.0.0.1/1.png",
        "/etc/passwd",
        "127.0.0.1/1.png",
        "http://",
        "http:///1.png",
        "http://[::1/1.png",
        "http://127.0.0.1:port/1.png",
        "http://127.0.0.1:99999/1.png",
        "",
        "\0",
        "http://127.0.0.1 /1.png",
    ],
)
def test_a_url_that_is_not_http_or_https_is_refused(opened, files, url):
    assert "is not an http or https address" in failure_of(opened(), event(image(url)), RejectedError)
    assert files() == {}


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/1.png", "gopher://127.0.0.1:6379/_FLUSHALL"])
def test_a_redirect_to_another_scheme_is_refused(opened, host, files, url):
    message = failure_of(opened(), event(image(host.serves("/1.png", redirect(url)))), RejectedError)
    assert "is not an http or https address" in message
    assert files() == {}


@pytest.mark.parametrize("how", ["url", "redirect"])
def test_credentials_are_refused_and_not_shown(opened, host, how):
    url = host.serves("/1.png").replace("http://", "http://user:hunter2@")
    start = host.serves("/start.png", redirect(url)) if how == "redirect" else url
    message = failure_of(opened(), event(image(start)), RejectedError)
    assert "credentials" in message
    assert "hunter2" not in message
    assert [path for path, _, _ in host.asked] == (["/start.png"] if how == "redirect" else [])


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(opened, host, files, code):
    host.serves("/end.gif")
    host.serves("/2.png", redirect("end.gif", code))
    host.serves("/1.png", redirect(f"//127.0.0.1:{host.server_port}/2.png", code))
    opened().deliver([event(image(host.serves("/0.png", redirect("/1.png", code))))], 10.0)
    assert files() == {"387702/1000.png": PNG}


def test_redirects_are_followed_three_times_only(opened, host, files):
    message = failure_of(opened(), event(image(host.serves("/1.png", redirect("/1.png")))), TransientError)
    assert "redirects more than 3 times" in message
    assert len(host.asked) == 4
    assert files() == {}


@pytest.mark.parametrize("location", ["http://[::1", "http://127.0.0.1:port/"])
def test_a_redirect_to_an_invalid_url_is_refused(opened, host, location):
    failure_of(opened(), event(image(host.serves("/1.png", redirect(location)))), RejectedError)


def test_with_a_proxy_hosts_are_checked_and_addresses_are_not(opened, host, files, monkeypatch):
    monkeypatch.setenv("http_proxy", host.url(""))
    resolver = Resolver()
    sink = opened(allow_private=False, edges={"resolve": resolver})
    host.pages["http://images.example/1.png"] = PNG
    sink.deliver([event(image("http://images.example/1.png"))], 10.0)
    assert files() == {"387702/1000.png": PNG}
    assert resolver.asked == ["127.0.0.1"]
    failure_of(sink, event(image("http://elsewhere.test/1.png", 2)), RejectedError)
    assert len(host.asked) == 1


# --- names ---

STRANGE = [
    "../../x",
    "../../../../../../../../etc/cron.d/x",
    "/etc/passwd",
    "..",
    ".",
    "",
    ".hidden",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a b",
    "a..b",
    "-rf",
    "_x",
    "~root",
    "$(reboot)",
    "雪",
    "\ud83c",
    "x" * 101,
    "x" * 100_000,
]


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("field", ["file_id", "task_id"])
def test_ids_cannot_lead_outside_the_root(opened, host, files, field, strange):
    sent = event(image(host.serves("/1.png")), **{field: strange})
    opened("{file_id}/{task_id}/{index}.{ext}").deliver([sent], 10.0)
    digest = hashlib.sha256(strange.encode(errors="surrogatepass")).hexdigest()[:16]
    others = {"file_id": "387702", "task_id": "task-1"} | {field: f"_{digest}"}
    assert files() == {f"{others['file_id']}/{others['task_id']}/0.png": PNG}


def test_distinct_values_stay_distinct():
    values = [*STRANGE, "x" * 100, "x" * 102, "387702", "task-1.x_y"]
    names = {safe_name(value, 100) for value in values}
    assert len(names) == len(values)
    again = {safe_name(name, 100) for name in names}
    assert len(names | again) > len(names)  # a generated name never equals the name of another value
    assert all(len(name) <= 100 for name in names)


@pytest.mark.parametrize("value", ["387702", "1500012548-Snapshot-0a1b2c", "a.b_c-d", "0", "x" * 100])
def test_harmless_values_stay_as_they_are(value):
    assert safe_name(value, 100) == value


@pytest.mark.parametrize("offset", [-5, 10**30, None])
def test_any_time_offset_makes_a_file_name(opened, host, files, offset):
    opened().deliver([event(image(host.serves("/1.png"), offset))], 10.0)
    (name,) = files()
    assert name.startswith("387702/_")


@pytest.mark.parametrize("inside", [True, False])
def test_a_symbolic_link_to_a_folder_is_not_followed(opened, host, files, root, tmp_path, inside):
    sink = opened()
    other = root / "other" if inside else tmp_path / "outside"
    other.mkdir()
    (root / "387702").symlink_to(other)
    message = failure_of(sink, event(image(host.serves("/1.png"))), TransientError)
    assert "symbolic link" in message
    assert files() == {}


def test_a_symbolic_link_at_the_file_path_is_replaced(opened, host, root, tmp_path):
    sink = opened()
    (root / "387702").mkdir()
    (tmp_path / "victim").write_text("mine")
    (root / "387702" / "1000.png").symlink_to(tmp_path / "victim")
    sink.deliver([event(image(host.serves("/1.png")))], 10.0)
    assert (tmp_path / "victim").read_text() == "mine"
    assert (root / "387702" / "1000.png").read_bytes() == PNG
    assert not (root / "387702" / "1000.png").is_symlink()


def test_the_root_itself_may_be_a_symbolic_link(opened, host, files, root, tmp_path):
    (tmp_path / "disk").mkdir()
    root.parent.mkdir()
    root.symlink_to(tmp_path / "disk")
    opened().deliver([event(image(host.serves("/1.png")))], 10.0)
    assert (tmp_path / "disk" / "387702" / "1000.png").read_bytes() == PNG


def test_a_folder_at_the_file_path_is_a_transient_error(opened, host, files, root):
    sink = opened()
    (root / "387702" / "1000.png").mkdir(parents=True)
    assert "was not saved" in failure_of(sink, event(image(host.serves("/1.png"))), TransientError)
    assert files() == {}


def test_a_root_that_was_removed_is_not_made_again(opened, host, root):
    sink = opened()
    root.rmdir()
    message = failure_of(sink, event(image(host.serves("/1.png"))), TransientError)
    assert "removed or unmounted" in message
    assert not root.exists()


# --- disks ---


def test_a_full_disk_is_transient_and_leaves_nothing_behind(opened, host, files):
    full = True

    def write(fd, data):
        if full:
            os.write(fd, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data[:1000])

    sink = opened(edges={"write": write})
    sent = event(image(host.serves("/1.png")))
    assert "No space left on device (free space on that disk)" in failure_of(sink, sent, TransientError)
    assert files() == {}
    full = False
    sink.deliver([sent], 10.0)
    assert files() == {"387702/1000.png": PNG}


def test_partial_files_of_a_killed_run_and_no_others_are_removed(opened, host, root):
    folder = root / "387702"
    folder.mkdir(parents=True)
    left = folder / ".vodpoller-0123456789abcdef.part"
    kept = [folder / ".vodpoller-0123.part", folder / "x.part", folder / ".vodpoller-0123456789abcdef.part.png"]
    busy = folder / ".vodpoller-fedcba9876543210.part"
    for path in (left, busy, *kept):
        path.write_bytes(b"torn")
    with busy.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        opened().deliver([event(image(host.serves("/1.png")))], 10.0)
    assert set(folder.iterdir()) == {*kept, busy, folder / "1000.png"}


def test_a_file_has_its_name_only_when_it_is_whole_and_synced(opened, host, root, monkeypatch):
    steps = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def step(*args, name=name, real=real, **kwargs):
            steps.append((name, sorted(path.name.startswith(".vodpoller-") for path in (root / "387702").glob("*"))))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, step)
    sink = opened()
    steps.clear()
    sink.deliver([event(image(host.serves("/1.png")))], 10.0)
    # The root, for the new folder; the file; its name; the folder.
    assert steps == [("fsync", []), ("fsync", [True]), ("rename", [True]), ("fsync", [False])]


def test_two_concurrent_events_may_have_the_same_image(opened, host, files):
    meet = threading.Barrier(2, timeout=10)

    def page(handler):
        meet.wait()
        handler.answer(200, PNG)

    sink = opened()
    sent = [event(image(host.serves("/1.png", page)), N=number) for number in range(2)]
    threads = [threading.Thread(target=sink.deliver, args=([each], 10.0)) for each in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files() == {"387702/1000.png": PNG}
