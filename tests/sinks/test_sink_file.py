import errno
import fcntl
import os
import random
import socket
import stat
import subprocess
import sys
import threading

import pytest
from pydantic import ValidationError

from tests.helpers import named, sink_context
from tests.polling import until
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import event_key, make_event, restore_event
from vodpoller.journal.contract import Position
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.sink import FileConfig, FileSink
from vodpoller.sinks.formats import encode


class FailPoints(Files):
    """Fails at the steps that a test sets, and records all steps."""

    def __init__(self):
        self.steps = []
        self.room_bytes = None
        self.piece_bytes = None
        self.failing = set()

    def _step(self, name, *facts):
        self.steps.append((name, *facts))
        if name in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync_folder(self, path):
        self._step("sync_folder", path.name)
        super().sync_folder(path)

    def open(self, path, flags):
        self._step("open", path.name)
        return super().open(path, flags)

    def write(self, fd, data):
        self._step("write", len(data))
        if self.room_bytes is not None:
            if self.room_bytes == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.room_bytes]
            self.room_bytes -= len(data)
        return super().write(fd, data[: self.piece_bytes])

    def fdatasync(self, fd):
        self._step("fdatasync")
        super().fdatasync(fd)

    def ftruncate(self, fd, length_bytes):
        self._step("ftruncate", length_bytes)
        super().ftruncate(fd, length_bytes)


def event(number, sub_app_id=None, **more):
    content = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}, **more}
    return make_event(content, source="main", sub_app_id=sub_app_id)


def line(number):
    return event(number).body + b"\n"


def lines(*numbers):
    return b"".join(map(line, numbers))


def keys(*numbers):
    return [event(number).key for number in numbers]


def recovered_keys(portions):
    return [
        key for portion in portions for key in (*portion.keys, *(key for line in portion.content_keys for key in line))
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def files():
    return FailPoints()


@pytest.fixture
def changes(lines):
    """The log lines of one event."""

    def found(name="file.changed"):
        return named(lines, name)

    return found


@pytest.fixture
def opened(path, files, log):
    """Opens the sink, any number of times; all are closed at the end."""
    sinks = []

    def open_it(at=path, **more):
        sinks.append(FileSink("archive", FileConfig(type="file", path=str(at)), sink_context(log), files=files, **more))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.fixture
def restarted(opened):
    """Recovers as a new process does; returns the sink and the recovered keys."""

    def restart(mark, sub_app_ids=(None,)):
        sink = opened()
        return sink, recovered_keys(sink.recover(mark, sub_app_ids))

    return restart


def problems(excinfo):
    return "\n".join(excinfo.value.problems)


# --- configuration ---


@pytest.mark.parametrize("bad", ["", "folder/", "nul\0"])
def test_a_path_that_names_no_file_is_refused(bad):
    with pytest.raises(ValidationError):
        FileConfig(type="file", path=bad)


@pytest.mark.parametrize("stream", ["/dev/stdout", "/dev/./stderr", "/dev/fd/1", "/proc/self/fd/2", "/proc/1/fd/3"])
def test_a_stream_is_refused_with_what_to_write_instead(stream):
    with pytest.raises(ValidationError, match='for standard output write type = "stdout"'):
        FileConfig(type="file", path=stream)


def test_a_link_to_a_stream_is_refused_too(tmp_path):
    reading, writing = os.pipe()
    try:
        (tmp_path / "link").symlink_to(f"/dev/fd/{writing}")
        with pytest.raises(ValidationError, match="is a stream"):
            FileConfig(type="file", path=str(tmp_path / "link"))
    finally:
        os.close(reading)
        os.close(writing)


def test_two_spellings_of_one_file_make_the_same_claim(path, tmp_path, monkeypatch):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    claims = [FileConfig(type="file", path=spelled).claims() for spelled in (str(path), str(link), "x/../events.jsonl")]
    assert claims == [{f"file:{path}"}] * 3


# --- opening ---


def test_a_folder_at_the_file_path_is_a_config_error(opened, path):
    path.mkdir()
    with pytest.raises(ConfigError) as excinfo:
        opened()
    assert problems(excinfo).startswith(f"sinks.archive.path: {path} cannot be opened: Is a directory (")


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def a_device(path):
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (a_pipe, '.*"exec".*a named pipe'),
        (a_socket, '.*"webhook".*a socket'),
        (a_device, '.*"stdout": this is a device'),
    ],
)
def test_what_is_not_a_file_is_refused_with_the_sink_to_use(opened, path, make, expected):
    make(path)
    with pytest.raises(ConfigError, match=f"it is not a regular file .*{expected}"):
        opened()
    with pytest.raises(ConfigError, match=f"it is not a regular file .*{expected}"):
        FileSink.probe("archive", FileConfig(type="file", path=str(path)), sink_context())
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_made_is_a_config_error(opened, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be opened"):
        opened(tmp_path / "file" / "sub" / "events.jsonl")


def test_a_missing_right_is_a_config_error_that_names_the_user(opened, files, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files, "open", refuse)
    with pytest.raises(ConfigError, match="the user that runs vodpoller"):
        opened()


def test_a_failed_opening_releases_the_lock(opened, files):
    files.failing = {"sync_folder"}
    with pytest.raises(TransientError):
        opened()
    files.failing = set()
    opened()


def test_missing_folders_are_made_and_each_is_synced_into_its_parent(opened, tmp_path, files):
    opened(tmp_path / "one" / "two" / "events.jsonl")
    assert files.steps == [
        ("sync_folder", tmp_path.name),
        ("sync_folder", "one"),
        ("open", "events.jsonl"),
        ("sync_folder", "two"),
    ]


def test_a_new_file_is_not_readable_by_others(opened, path):
    before = os.umask(0)
    try:
        opened()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_relative_path_is_below_the_working_directory(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened("events.jsonl").deliver([event(1)], 5.0)
    assert (tmp_path / "events.jsonl").read_bytes() == line(1)


def test_a_second_process_is_refused_with_a_way_to_find_the_first(opened, path):
    sink = opened()
    code = (
        "import sys\n"
        "import structlog\n"
        "from vodpoller.errors import ConfigError\n"
        "from vodpoller.sinks.contract import SinkContext\n"
        "from vodpoller.sinks.file.sink import FileConfig, FileSink\n"
        "try:\n"
        "    FileSink('archive', FileConfig(type='file', path=sys.argv[1]), SinkContext(log=structlog.get_logger()))\n"
        "except ConfigError as error:\n"
        "    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert f"sinks.archive.path: another process writes to {path}" in second.stderr
    assert f"fuser -v {path}.lock" in second.stderr
    sink.close()
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_synced_is_a_warning_once(opened, path, tmp_path, files, monkeypatch, changes, number):
    def refuse(_path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync_folder", refuse)
    sink = opened(tmp_path / "new" / "events.jsonl")
    sink.deliver([event(1)], 5.0)
    (tmp_path / "new" / "events.jsonl").rename(tmp_path / "new" / "events.jsonl.1")
    sink.reopen()
    sink.deliver([event(2)], 5.0)
    (log_line,) = changes("config.warning")
    assert log_line["message"].startswith(
        f"sinks.archive.path: {tmp_path} is on a file system that cannot sync folders"
    )
    assert (tmp_path / "new" / "events.jsonl").read_bytes() == line(2)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_as_such(opened, monkeypatch, number):
    def refuse(_fd, _kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"events\.jsonl\.lock cannot be opened: ") as excinfo:
        opened()
    assert "another process" not in problems(excinfo)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE])
def test_a_disk_error_at_the_start_is_transient(opened, files, monkeypatch, number):
    def refuse(_path, _flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "open", refuse)
    with pytest.raises(TransientError):
        opened()


def test_a_lock_that_is_held_for_an_instant_is_waited_for(opened, path):
    held = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_SH)  # as `check --connect` does
    timer = threading.Timer(0.1, os.close, (held,))
    timer.start()
    try:
        opened().deliver([event(1)], 5.0)
    finally:
        timer.join()


# --- appending ---


def test_a_call_is_one_write_and_one_sync(opened, files, path):
    sink = opened()
    sink.recover(None, [None])
    files.steps.clear()
    sink.deliver([event(number) for number in range(1024)], 5.0)
    assert files.steps == [("write", len(lines(*range(1024)))), ("fdatasync",)]
    assert path.read_bytes() == lines(*range(1024))


def test_short_writes_are_continued(opened, files, path):
    files.piece_bytes = 7
    opened().deliver([event(1), event(2)], 5.0)
    assert path.read_bytes() == lines(1, 2)


@pytest.mark.parametrize("room_bytes", [0, 1, len(line(2)) - 1, len(line(2)), len(lines(2, 3)) - 1])
def test_a_full_disk_leaves_the_file_as_it_was(opened, files, path, room_bytes):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    before = sink.position()
    files.room_bytes = room_bytes
    with pytest.raises(TransientError, match="free space"):
        sink.deliver([event(2), event(3)], 5.0)
    assert path.read_bytes() == line(1)
    assert sink.position() == before
    files.room_bytes = None
    sink.deliver([event(2), event(3)], 5.0)
    assert path.read_bytes() == lines(1, 2, 3)
    assert sink.position() == Position(inode=path.stat().st_ino, offset_bytes=len(lines(1, 2, 3)))


def test_a_failed_sync_cuts_the_lines_and_the_retry_writes_them(opened, files, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.failing = {"fdatasync"}
    with pytest.raises(TransientError, match="Input/output error"):
        sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == line(1)
    files.failing = set()
    files.steps.clear()
    sink.deliver([event(2)], 5.0)
    assert files.steps == [("write", len(line(2))), ("fdatasync",)]
    assert path.read_bytes() == lines(1, 2)


@pytest.mark.parametrize("failing", [{"fdatasync", "ftruncate"}, {"ftruncate"}])
def test_a_torn_tail_is_cut_before_anything_else_is_written(opened, files, path, failing):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.failing = failing
    files.room_bytes = None if "fdatasync" in failing else 5
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    files.room_bytes = None
    assert path.stat().st_size > len(line(1))
    for _ in range(2):
        with pytest.raises(TransientError):
            sink.deliver([event(3)], 5.0)
    files.failing = set()
    sink.deliver([event(4)], 5.0)
    assert path.read_bytes() == lines(1, 4)


def test_a_file_that_an_operator_emptied_is_not_filled_with_zeros(opened, files, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    os.truncate(path, 0)
    files.room_bytes = 5
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == b""
    files.room_bytes = None
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == line(2)


def test_an_emptied_file_with_a_torn_tail_is_not_filled_with_zeros(opened, files, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.room_bytes, files.failing = 5, {"ftruncate"}
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    os.truncate(path, 0)
    files.room_bytes, files.failing = None, set()
    sink.deliver([event(3)], 5.0)
    assert path.read_bytes() == line(3)


def test_a_file_that_was_removed_is_created_again(opened, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    path.unlink()
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == line(2)


def test_a_body_with_a_raw_newline_is_rejected(opened, path):
    malformed = restore_event(body=b'{\n"a"', key=b"", event_type="", source="main", sub_app_id=None)
    sink = opened()
    with pytest.raises(RejectedError):
        sink.examine(malformed)
    with pytest.raises(RejectedError):
        sink.deliver([malformed], 5.0)
    assert path.read_bytes() == b""


def test_a_torn_tail_is_cut_even_without_a_recovery(opened, path):
    path.write_bytes(line(1) + line(2)[:-3])
    opened().deliver([event(3)], 5.0)
    assert path.read_bytes() == lines(1, 3)


# --- other processes write to the file ---

FOREIGN = [
    b"hello",
    b"hello\n",
    b"one\ntwo",
    b"\n",
    b'{"note": "not compact',
    b'{"note":"whole"}',
    b'{"note":"whole"}\n',
    b"\0\xff garbage\n",
    b"ends with zeros\0\0",
    b"\0\xff",
    b'{"note\0":\t1}\n',
    random.Random(1).randbytes(3000),
]


def own_lines(data):
    """The numbers of the events whose lines are in this data."""
    known = {line(number).rstrip(b"\n"): number for number in range(100)}
    return [known[each] for each in data.split(b"\n") if each in known]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_bytes_are_kept_and_logged_before_the_next_line(opened, path, foreign, changes):
    sink = opened()
    sink.recover(None, [None])
    sink.deliver([event(1)], 5.0)
    with path.open("ab") as file:
        file.write(foreign)
    sink.deliver([event(2)], 5.0)
    sink.deliver([event(3)], 5.0)
    end = b"" if foreign.endswith(b"\n") else b"\n"
    assert path.read_bytes() == line(1) + foreign + end + lines(2, 3)
    assert sink.position().offset_bytes == path.stat().st_size
    (log_line,) = changes()
    assert f"wrote {len(foreign)} bytes" in log_line["message"]
    assert log_line["path"] == str(path)


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_bytes_in_the_middle_survive_recovery(opened, restarted, path, foreign):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    with path.open("ab") as file:
        file.write(foreign)
    sink.deliver([event(2), event(3)], 5.0)
    sink.close()
    before = path.read_bytes()
    sink, found = restarted(mark)
    assert path.read_bytes() == before
    assert [key for key in found if key in keys(1, 2, 3)] == keys(2, 3)
    sink.deliver([event(4)], 5.0)
    assert path.read_bytes() == before + line(4)


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("has_mark", [True, False])
def test_foreign_bytes_at_the_end_survive_recovery(opened, restarted, path, foreign, has_mark):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    sink.deliver([event(2)], 5.0)
    sink.close()
    with path.open("ab") as file:
        file.write(foreign)
    sink, found = restarted(mark if has_mark else None)
    assert [key for key in found if key in keys(1, 2)] == keys(1, 2)[has_mark:]
    sink.deliver([event(3)], 5.0)
    end = b"" if foreign.endswith(b"\n") else b"\n"
    assert path.read_bytes() == lines(1, 2) + foreign + end + line(3)


@pytest.mark.parametrize("torn_bytes", [1, 2, 17, len(line(3)) - 3])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_torn_line_is_cut_and_foreign_bytes_before_it_are_kept(opened, restarted, path, foreign, torn_bytes):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    with path.open("ab") as file:
        file.write(foreign)
    sink.deliver([event(2)], 5.0)
    sink.close()
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(line(3)[:torn_bytes])
    _, found = restarted(mark)
    assert path.read_bytes() == before
    assert [key for key in found if key in keys(1, 2, 3)] == keys(2)


@pytest.mark.parametrize("body_format", ["callback", "cloudevents"])
def test_an_event_line_without_its_newline_is_torn(path, body_format):
    path.write_bytes(encode(event(1), body_format))
    sink = FileSink("archive", FileConfig(type="file", path=str(path), format=body_format), sink_context())
    try:
        assert recovered_keys(sink.recover(None, [None])) == []
    finally:
        sink.close()
    assert path.read_bytes() == b""


def test_an_untyped_event_without_its_newline_counts_as_written(restarted, path):
    without_type = make_event({"ComposeMediaCompleteEvent": {"TaskId": "1"}}, source="main", sub_app_id=None)
    path.write_bytes(without_type.body)
    assert restarted(None)[1] == [without_type.key]
    assert path.read_bytes() == without_type.body + b"\n"


@pytest.mark.parametrize(
    "text",
    [
        b'{"EventType":"x","A":[1,-2.5e-7,true,false,null,{}],"B":{"C":"\\u12',
        line(3)[:-1],
        b'{"a":"\xe9\x9b',
        b'{"a":"x\\',
        b'{"a":tr',
        b'{"a":-',
        b"{",
        b'{"',
    ],
)
def test_a_possible_beginning_of_an_event_line_is_cut(restarted, path, text):
    path.write_bytes(line(1) + text)
    restarted(None)
    assert path.read_bytes() == line(1)


@pytest.mark.parametrize("tail", [line(3)[:-1], line(3)[:-2], b"hello", b'{"a":1}'])
@pytest.mark.parametrize("mode", [0o640, 0o440])
def test_a_rotated_file_is_repaired_too(opened, restarted, path, tmp_path, tail, mode):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    sink.deliver([event(2)], 5.0)
    sink.close()
    rotated = path.rename(tmp_path / "events.jsonl.1")
    with rotated.open("ab") as file:
        file.write(tail)
    rotated.chmod(mode)
    found = restarted(mark)[1]
    assert found[:1] == keys(2)
    assert len(found) == (2 if tail == b'{"a":1}' else 1)
    if os.access(rotated, os.W_OK):
        left = {b'{"a":1}': b'{"a":1}\n', b"hello": b"hello"}.get(tail, b"")
        assert rotated.read_bytes() == lines(1, 2) + left


def test_foreign_bytes_that_recovery_finds_are_logged_once(restarted, path, changes):
    path.write_bytes(line(1) + b"one\n" + line(2) + b"two\n" + b"three")
    sink, found = restarted(None)
    sink.deliver([event(3)], 5.0)
    assert found == keys(1, 2)
    assert len(changes()) == 1


def test_a_known_file_may_hold_only_foreign_bytes(restarted, path):
    path.write_bytes(b"hello")
    sink, _ = restarted(Position(inode=path.stat().st_ino, offset_bytes=len(line(1))))
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == b"hello\n" + line(2)


@pytest.mark.parametrize("rest_bytes", [0, 5, len(line(1))])
def test_a_file_that_was_cut_is_continued_with_a_log_line(opened, path, rest_bytes, changes):
    sink = opened()
    sink.deliver([event(1), event(2)], 5.0)
    os.truncate(path, rest_bytes)
    sink.deliver([event(3)], 5.0)
    sink.deliver([event(4)], 5.0)
    rest = lines(1, 2)[:rest_bytes]
    assert path.read_bytes() == rest + (b"\n" if rest_bytes == 5 else b"") + lines(3, 4)
    (log_line,) = changes()
    assert f"cut {len(lines(1, 2)) - rest_bytes} bytes off" in log_line["message"]


@pytest.mark.parametrize("rest_bytes", [0, len(line(1))])
@pytest.mark.parametrize("marked", [1, 2])
def test_after_a_cut_no_line_is_skipped_even_if_one_ends_at_the_mark(opened, restarted, path, rest_bytes, marked):
    sink = opened()
    for number in range(1, 1 + marked):
        sink.deliver([event(number)], 5.0)
    mark = sink.position()
    os.truncate(path, min(rest_bytes, mark.offset_bytes))
    sink.deliver([event(3), event(4), event(5)], 5.0)  # the process dies before the mark is moved
    sink.close()
    assert path.read_bytes()[mark.offset_bytes - 1 : mark.offset_bytes] == b"\n"
    sink, found = restarted(mark)
    assert [key for key in found if key in keys(3, 4, 5)] == keys(3, 4, 5)
    mark = sink.position()
    sink.deliver([event(6)], 5.0)
    sink.close()
    assert restarted(mark)[1] == keys(6)


def test_after_two_cuts_recovery_starts_at_the_lower_one(opened, restarted, path):
    sink = opened()
    sink.deliver([event(1), event(2), event(3)], 5.0)
    mark = sink.position()
    os.truncate(path, 0)
    sink.deliver([event(4), event(5)], 5.0)
    os.truncate(path, len(line(4)))
    sink.deliver([event(6), event(7)], 5.0)
    sink.close()
    assert restarted(mark)[1] == keys(4, 6, 7)


def test_foreign_bytes_written_meanwhile_do_not_join_an_event_line(opened, files, path, monkeypatch):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    write, done = files.write, []

    def write_behind_another(fd, data):
        if not done:
            done.append(os.write(fd, b"hello"))
        return write(fd, data)

    monkeypatch.setattr(files, "write", write_behind_another)
    sink.deliver([event(2), event(3)], 5.0)
    assert sorted(own_lines(path.read_bytes())) == [1, 2, 3]
    assert path.read_bytes().startswith(line(1) + b"hello")
    assert sink.position().offset_bytes == path.stat().st_size


def test_foreign_bytes_after_a_failed_append_are_not_cut(opened, files, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.failing, files.room_bytes = {"ftruncate"}, 5
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    with path.open("ab") as file:
        file.write(b"hello")
    files.failing, files.room_bytes = set(), None
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == line(1) + line(2)[:5] + b"hello\n" + line(2)


# --- rotation ---


def test_reopening_an_unmoved_file_changes_nothing(opened, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    sink.reopen()
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == lines(1, 2)


def test_after_a_rename_the_old_file_is_used_until_the_reopen(opened, path, tmp_path, files):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    rotated = path.rename(tmp_path / "events.jsonl.1")
    sink.deliver([event(2)], 5.0)
    files.steps.clear()
    sink.reopen()
    assert files.steps == [("open", "events.jsonl"), ("sync_folder", tmp_path.name)]
    assert path.read_bytes() == b""
    sink.deliver([event(3)], 5.0)
    assert rotated.read_bytes() == lines(1, 2)
    assert path.read_bytes() == line(3)
    assert sink.position() == Position(inode=path.stat().st_ino, offset_bytes=len(line(3)))


def held_in_its_write(sink, files, monkeypatch):
    """A thread in the write of its delivery, and the event that lets the write go on."""
    in_write, go_on = threading.Event(), threading.Event()

    def held_write(fd, data):
        in_write.set()
        assert go_on.wait(10)
        return os.write(fd, data)

    monkeypatch.setattr(files, "write", held_write)
    delivering = threading.Thread(target=sink.deliver, args=([event(1)], 5.0))
    delivering.start()
    assert in_write.wait(10)
    return delivering, go_on


def test_reopening_during_an_append_waits_for_its_end(opened, path, tmp_path, files, monkeypatch):
    sink = opened()
    delivering, go_on = held_in_its_write(sink, files, monkeypatch)
    rotated = path.rename(tmp_path / "events.jsonl.1")
    sink.reopen()
    assert not path.exists()
    go_on.set()
    delivering.join()
    until(path.exists)
    assert rotated.read_bytes() == line(1)
    assert path.read_bytes() == b""
    assert sink.position() == Position(inode=rotated.stat().st_ino, offset_bytes=len(line(1)))


def test_a_failed_reopen_is_tried_again_by_the_next_append(opened, path, tmp_path, files):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    rotated = path.rename(tmp_path / "events.jsonl.1")
    files.failing = {"open"}
    sink.reopen()
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    files.failing = set()
    sink.deliver([event(2)], 5.0)
    assert (rotated.read_bytes(), path.read_bytes()) == (line(1), line(2))


def test_a_torn_tail_is_cut_before_a_new_file_is_opened(opened, path, tmp_path, files):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.room_bytes, files.failing = 5, {"ftruncate"}
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    rotated = path.rename(tmp_path / "events.jsonl.1")
    sink.reopen()
    assert not path.exists()
    files.room_bytes, files.failing = None, set()
    sink.deliver([event(2)], 5.0)
    assert (rotated.read_bytes(), path.read_bytes()) == (line(1), line(2))


# --- recovery ---


def test_a_crash_at_any_byte_of_a_batch_keeps_its_complete_lines(restarted, path):
    known, batch = lines(1, 2), lines(3, 4, 5)
    path.write_bytes(known)
    mark = Position(inode=path.stat().st_ino, offset_bytes=len(known))
    for cut in range(len(batch) + 1):
        path.write_bytes(known + batch[:cut])
        whole = batch[:cut].count(b"\n")
        sink, found = restarted(mark)
        assert found == keys(3, 4, 5)[:whole]
        assert path.read_bytes() == known + b"".join(batch.splitlines(keepends=True)[:whole])
        assert sink.position() == Position(inode=mark.inode, offset_bytes=path.stat().st_size)
        sink.close()


@pytest.mark.parametrize("zeros", [1, 4096, 200_000])
@pytest.mark.parametrize(
    "before_zeros", [b"", line(3)[:-1], line(3)[:9]], ids=["after a line", "after all but its end", "inside a line"]
)
@pytest.mark.parametrize("after_zeros", [b"", b"\n", b'z"}\n', b'z"}\n\0\0'])
def test_zeros_that_a_crash_left_are_cut_off(restarted, path, zeros, before_zeros, after_zeros):
    path.write_bytes(lines(1, 2) + before_zeros + bytes(zeros) + after_zeros)
    _, found = restarted(Position(inode=path.stat().st_ino, offset_bytes=len(line(1))))
    assert found == keys(2)
    assert path.read_bytes() == lines(1, 2)


def test_a_file_of_nothing_but_zeros_is_emptied(restarted, path):
    path.write_bytes(bytes(10_000))
    assert restarted(None)[1] == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", [b"one torn line of something else", b"SQLite format 3\0"])
def test_a_file_of_another_format_is_refused_and_not_changed(opened, path, content):
    path.write_bytes(content)
    sink = opened()
    with pytest.raises(ConfigError, match="its content is not JSON lines"):
        sink.recover(None, [None])
    with pytest.raises(TransientError, match="its content is not JSON lines"):
        sink.deliver([event(1)], 5.0)
    assert path.read_bytes() == content


def test_without_a_mark_the_whole_file_is_read(restarted, path):
    path.write_bytes(lines(1, 2, 3))
    assert restarted(None)[1] == keys(1, 2, 3)


def test_complete_lines_that_are_not_events_are_skipped_and_kept(restarted, path):
    strange = b'not json\n[1]\n"text"\n\n\xff\xfe\n{"a": NaN}\n{"zero": "\0"}\n'
    path.write_bytes(line(1) + strange + line(2))
    assert restarted(None)[1] == keys(1, 2)
    assert path.read_bytes() == line(1) + strange + line(2)


def test_each_sub_app_id_gives_a_line_another_key(restarted, path):
    path.write_bytes(line(1))
    assert restarted(None, (None, 1500000001))[1] == [event(1).key, event(1, sub_app_id=1500000001).key]


@pytest.mark.parametrize(
    "more",
    [{"Id": 18446744073709551616123}, {"Title": "half \ud83c"}, {"Title": "雪\u2028"}, {"Ratio": 1e-7, "B": 1.0}],
)
def test_the_key_of_a_line_is_that_of_the_event(opened, restarted, more):
    sink = opened()
    sink.deliver([event(1, **more)], 5.0)
    sink.close()
    assert restarted(None)[1] == [event(1, **more).key]
    assert event(1, **more).key == event_key(event(1, **more).content, None)


def test_recovered_lines_are_synced_before_they_are_reported(opened, path, files):
    path.write_bytes(line(1))
    sink = opened()
    files.failing = {"fdatasync"}
    with pytest.raises(TransientError, match="Input/output error"):
        sink.recover(None, [None])


def test_the_repair_does_not_wait_until_the_keys_are_read(opened, path):
    path.write_bytes(line(1) + b'{"torn')
    opened().recover(None, [None])
    assert path.read_bytes() == line(1)


def test_after_rename_and_restart_both_files_are_read_after_the_mark(opened, restarted, path, tmp_path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    sink.deliver([event(2)], 5.0)
    path.rename(tmp_path / "events.jsonl-20261123")
    sink.reopen()
    sink.deliver([event(3)], 5.0)
    sink.close()
    assert restarted(mark)[1] == keys(2, 3)


def test_a_file_renamed_without_reopen_is_read_from_the_mark(opened, restarted, path, tmp_path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    sink.deliver([event(2)], 5.0)
    sink.close()
    rotated = path.rename(tmp_path / "events.jsonl.1")
    with rotated.open("ab") as file:
        file.write(b'{"torn')
    sink, found = restarted(mark)
    assert found == keys(2)
    assert sink.position() == Position(inode=path.stat().st_ino, offset_bytes=0)


def test_recovery_reads_newer_rotated_files_not_older_or_packed(restarted, path, tmp_path):
    for name, age_secs, number in [
        ("events.jsonl.4", 400, 4),
        ("events.jsonl.3", 300, 3),
        ("events.jsonl.2", 200, 2),
        ("events.jsonl.1", 100, 1),
        ("events.jsonl", 0, 0),
        ("events.jsonl.0.gz", 50, 9),
        ("other.jsonl", 50, 8),
    ]:
        (tmp_path / name).write_bytes(lines(number * 10, number * 10 + 1))
        os.utime(tmp_path / name, (1_700_000_000 - age_secs,) * 2)
    mark = Position(inode=(tmp_path / "events.jsonl.3").stat().st_ino, offset_bytes=len(line(30)))
    assert restarted(mark)[1] == keys(31, 20, 21, 10, 11, 0, 1)


def test_if_the_marked_file_is_gone_the_current_one_is_read_whole(restarted, path):
    path.write_bytes(lines(1, 2))
    assert restarted(Position(inode=1, offset_bytes=500))[1] == keys(1, 2)


@pytest.mark.parametrize("offset_bytes", [0, 5, 10_000], ids=["start", "inside a line", "beyond the end"])
def test_a_mark_that_does_not_fit_the_content_makes_recovery_read_all(restarted, path, offset_bytes):
    path.write_bytes(lines(1, 2))
    assert restarted(Position(inode=path.stat().st_ino, offset_bytes=offset_bytes))[1] == keys(1, 2)


def test_a_rename_between_the_repair_and_the_reading_is_followed(opened, path, tmp_path):
    path.write_bytes(lines(1, 2))
    sink = opened()
    found = sink.recover(None, [None])
    path.rename(tmp_path / "events.jsonl.1")
    assert recovered_keys(found) == keys(1, 2)


def test_a_line_that_is_too_long_is_skipped(restarted, path, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.file.lines.LINE_MAX_BYTES", 200)
    path.write_bytes(line(1) + event(2, Text="x" * 1000).body + b"\n" + line(3))
    assert restarted(None)[1] == keys(1, 3)


# --- recovery in portions ---


@pytest.mark.parametrize(("bound", "value"), [("PORTION_KEYS", 7), ("PORTION_BYTES", 7 * len(line(1)))])
def test_a_recovery_can_continue_after_each_of_its_portions(
    restarted, opened, path, tmp_path, monkeypatch, bound, value
):
    monkeypatch.setattr(f"vodpoller.sinks.file.recovery.{bound}", value)
    path.write_bytes(lines(*range(10, 40)))
    sink = opened()
    sink.recover(None, [None])
    mark = Position(inode=sink.position().inode, offset_bytes=len(lines(10, 11)))
    path.rename(tmp_path / "events.jsonl.1")
    sink.reopen()
    sink.deliver([event(number) for number in range(40, 60)], 5.0)
    sink.close()
    sink = opened()
    portions = list(sink.recover(mark, [None]))
    sink.close()
    assert len(portions) > 5
    assert [len(portion.keys) for portion in portions[:-1]] == [7] * (len(portions) - 1)
    assert recovered_keys(portions) == keys(*range(12, 60))
    assert sorted(portion.read for portion in portions) == [portion.read for portion in portions]
    assert [portion.read < 1 for portion in portions] == [True] * (len(portions) - 1) + [False]
    assert portions[-1].position == sink.position()
    done = 0
    for portion in portions:
        done += len(portion.keys)
        again, found = restarted(portion.position)
        again.close()
        assert found == keys(*range(12 + done, 60))


def test_lines_without_a_key_make_portions_too(opened, path, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.file.recovery.PORTION_BYTES", 100)
    path.write_bytes(b"not ours\n" * 1000)
    assert len(list(opened().recover(None, [None]))) > 50


@pytest.mark.parametrize("content", [b"", lines(1, 2)])
def test_without_lines_after_the_mark_there_is_no_portion(opened, path, content):
    path.write_bytes(content)
    sink = opened()
    assert list(sink.recover(sink.position() if content else None, [None])) == []


def test_delivery_goes_on_after_recovery(restarted, path):
    path.write_bytes(lines(1, 2) + b'{"torn')
    sink, _ = restarted(None)
    sink.deliver([event(3)], 5.0)
    assert path.read_bytes() == lines(1, 2, 3)


# --- closing ---


def test_closing_does_not_wait_for_a_write_that_hangs(opened, files, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.file.sink._CLOSE_WAIT_SECS", 0.05)
    sink = opened()
    delivering, go_on = held_in_its_write(sink, files, monkeypatch)
    sink.close()
    assert delivering.is_alive()
    go_on.set()
    delivering.join()
