import errno
import os
import stat
import subprocess
import sys
import threading

import pytest
from pydantic import ValidationError

from tests.receiver import until
from vodpoller.delivery import Position
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events import event_key, make_event, restore_event
from vodpoller.sinks.file import FileConfig, Files, FileSink


class FailPoints(Files):
    """Fails where a test wants it to, and records what is done."""

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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def files():
    return FailPoints()


@pytest.fixture
def opened(path, files):
    """Opens the sink, as often as the test likes; at the end all are closed."""
    sinks = []

    def open_it(at=path, **more):
        sinks.append(FileSink("archive", FileConfig(type="file", path=str(at)), files=files, **more))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.fixture
def restarted(opened):
    """What a new process makes of what an old one left: the sink, and the keys that it found."""

    def restart(mark, sub_app_ids=(None,)):
        sink = opened()
        return sink, list(sink.recover(mark, sub_app_ids))

    return restart


def problems(excinfo):
    return "\n".join(excinfo.value.problems)


# --- configuration ---


@pytest.mark.parametrize("bad", ["", "folder/", "nul\0"])
def test_a_path_that_names_no_file_is_refused(bad):
    with pytest.raises(ValidationError):
        FileConfig(type="file", path=bad)


def test_two_spellings_of_one_file_make_the_same_claim(path, tmp_path, monkeypatch):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    claims = [FileConfig(type="file", path=spelled).claims() for spelled in (str(path), str(link), "x/../events.jsonl")]
    assert claims == [{f"file:{path}"}] * 3


# --- opening ---


def test_a_folder_in_the_files_place_is_a_config_error(opened, path):
    path.mkdir()
    with pytest.raises(ConfigError) as excinfo:
        opened()
    assert problems(excinfo).startswith(f"sinks.archive.path: {path} cannot be opened: Is a directory (")


def test_a_named_pipe_in_the_files_place_is_a_config_error_and_does_not_hang(opened, path):
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        opened()


def test_a_folder_that_cannot_be_made_is_a_config_error(opened, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be opened"):
        opened(tmp_path / "file" / "sub" / "events.jsonl")


def test_a_missing_right_is_a_config_error_that_says_who_needs_it(opened, files, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files, "open", refuse)
    with pytest.raises(ConfigError, match="the user that runs vodpoller"):
        opened()


def test_a_failed_opening_gives_the_lock_back(opened, files):
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


def test_another_process_is_kept_out_and_told_how_to_find_the_first(opened, path):
    sink = opened()
    code = (
        "import sys\n"
        "from vodpoller.errors import ConfigError\n"
        "from vodpoller.sinks.file import FileConfig, FileSink\n"
        "try:\n"
        "    FileSink('archive', FileConfig(type='file', path=sys.argv[1]))\n"
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


def test_a_failed_sync_takes_the_lines_back_and_the_retry_writes_them_again(opened, files, path):
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
def test_a_tail_that_cannot_be_cut_is_cut_before_anything_else_is_written(opened, files, path, failing):
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


def test_a_file_that_an_operator_emptied_is_not_filled_up_with_zeros(opened, files, path):
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


def test_a_file_that_was_emptied_while_its_tail_was_dirty_is_not_filled_up_with_zeros(opened, files, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    files.room_bytes, files.failing = 5, {"ftruncate"}
    with pytest.raises(TransientError):
        sink.deliver([event(2)], 5.0)
    os.truncate(path, 0)
    files.room_bytes, files.failing = None, set()
    sink.deliver([event(3)], 5.0)
    assert path.read_bytes() == line(3)


def test_a_file_that_was_removed_is_made_anew(opened, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    path.unlink()
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == line(2)


def test_a_body_with_a_raw_newline_is_rejected(opened, path):
    malformed = restore_event(body=b'{\n"a"', key=b"", event_type="", source="main", sub_app_id=None)
    with pytest.raises(RejectedError):
        opened().deliver([malformed], 5.0)
    assert path.read_bytes() == b""


def test_a_torn_tail_is_cut_even_if_nobody_asked_for_recovery(opened, path):
    path.write_bytes(line(1) + line(2)[:-3])
    opened().deliver([event(3)], 5.0)
    assert path.read_bytes() == lines(1, 3)


# --- rotation ---


def test_reopening_an_unmoved_file_changes_nothing(opened, path):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    sink.reopen()
    sink.deliver([event(2)], 5.0)
    assert path.read_bytes() == lines(1, 2)


def test_after_a_rename_lines_follow_the_old_file_until_it_is_reopened(opened, path, tmp_path, files):
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


def test_reopening_during_an_append_waits_for_its_end(opened, path, tmp_path, files, monkeypatch):
    sink = opened()
    in_write, go_on = threading.Event(), threading.Event()

    def slow_write(fd, data):
        in_write.set()
        assert go_on.wait(10)
        return os.write(fd, data)

    monkeypatch.setattr(files, "write", slow_write)
    delivering = threading.Thread(target=sink.deliver, args=([event(1)], 5.0))
    delivering.start()
    assert in_write.wait(10)
    rotated = path.rename(tmp_path / "events.jsonl.1")
    sink.reopen()
    assert not path.exists()
    go_on.set()
    delivering.join()
    until(path.exists)
    assert rotated.read_bytes() == line(1)
    assert path.read_bytes() == b""
    assert sink.position() == Position(inode=rotated.stat().st_ino, offset_bytes=len(line(1)))


def test_a_path_that_cannot_be_reopened_is_tried_again_by_the_next_append(opened, path, tmp_path, files):
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


def test_a_dirty_tail_is_cut_off_the_old_file_before_the_new_one_is_opened(opened, path, tmp_path, files):
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


def test_a_crash_at_any_byte_of_the_last_batch_leaves_exactly_its_whole_lines(restarted, path):
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
def test_a_file_that_cannot_be_ours_is_refused_and_left_alone(opened, path, content):
    path.write_bytes(content)
    sink = opened()
    with pytest.raises(ConfigError, match="something else than JSON lines"):
        sink.recover(None, [None])
    with pytest.raises(TransientError, match="something else than JSON lines"):
        sink.deliver([event(1)], 5.0)
    assert path.read_bytes() == content


def test_without_a_mark_the_whole_file_is_read(restarted, path):
    path.write_bytes(lines(1, 2, 3))
    assert restarted(None)[1] == keys(1, 2, 3)


def test_whole_lines_that_are_no_event_are_passed_over_and_kept(restarted, path):
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


def test_what_is_found_is_synced_before_it_is_told(opened, path, files):
    path.write_bytes(line(1))
    sink = opened()
    files.failing = {"fdatasync"}
    with pytest.raises(TransientError, match="Input/output error"):
        sink.recover(None, [None])


def test_the_repair_does_not_wait_for_the_keys_to_be_taken(opened, path):
    path.write_bytes(line(1) + b'{"torn')
    opened().recover(None, [None])
    assert path.read_bytes() == line(1)


def test_after_a_rename_and_a_restart_the_old_file_is_read_from_the_mark_and_the_new_one_whole(
    opened, restarted, path, tmp_path
):
    sink = opened()
    sink.deliver([event(1)], 5.0)
    mark = sink.position()
    sink.deliver([event(2)], 5.0)
    path.rename(tmp_path / "events.jsonl-20261123")
    sink.reopen()
    sink.deliver([event(3)], 5.0)
    sink.close()
    assert restarted(mark)[1] == keys(2, 3)


def test_after_a_rename_without_reopening_the_old_file_is_read_from_the_mark(opened, restarted, path, tmp_path):
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


def test_files_rotated_since_the_marked_one_are_read_whole_and_older_and_packed_ones_not(restarted, path, tmp_path):
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


def test_a_marked_file_that_is_gone_has_the_whole_current_one_read(restarted, path):
    path.write_bytes(lines(1, 2))
    assert restarted(Position(inode=1, offset_bytes=500))[1] == keys(1, 2)


@pytest.mark.parametrize("offset_bytes", [0, 5, 10_000], ids=["start", "inside a line", "beyond the end"])
def test_a_mark_that_cannot_be_of_this_content_has_all_of_it_read(restarted, path, offset_bytes):
    path.write_bytes(lines(1, 2))
    assert restarted(Position(inode=path.stat().st_ino, offset_bytes=offset_bytes))[1] == keys(1, 2)


def test_a_rename_between_the_repair_and_the_reading_is_followed(opened, path, tmp_path):
    path.write_bytes(lines(1, 2))
    sink = opened()
    found = sink.recover(None, [None])
    path.rename(tmp_path / "events.jsonl.1")
    assert list(found) == keys(1, 2)


def test_a_line_beyond_all_bounds_is_passed_over(restarted, path, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.file._LINE_MAX_BYTES", 200)
    path.write_bytes(line(1) + event(2, Text="x" * 1000).body + b"\n" + line(3))
    assert restarted(None)[1] == keys(1, 3)


def test_delivery_goes_on_after_recovery(restarted, path):
    path.write_bytes(lines(1, 2) + b'{"torn')
    sink, _ = restarted(None)
    sink.deliver([event(3)], 5.0)
    assert path.read_bytes() == lines(1, 2, 3)


# --- closing ---


def test_closing_does_not_wait_for_a_write_that_hangs(opened, files, monkeypatch):
    monkeypatch.setattr("vodpoller.sinks.file._CLOSE_WAIT_SECS", 0.05)
    sink = opened()
    in_write, go_on = threading.Event(), threading.Event()

    def hanging_write(fd, data):
        in_write.set()
        assert go_on.wait(10)
        return os.write(fd, data)

    monkeypatch.setattr(files, "write", hanging_write)
    delivering = threading.Thread(target=sink.deliver, args=([event(1)], 5.0))
    delivering.start()
    assert in_write.wait(10)
    sink.close()
    assert delivering.is_alive()
    go_on.set()
    delivering.join()
