"""The sink renames its file: each line is in exactly one file, and recovery finds it there."""

import errno
import os
import zoneinfo
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from tests.helpers import FakeClock, event, named, sink_context
from vodpoller.errors import TransientError
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.sink import FileConfig, FileSink

BERLIN = "Europe/Berlin"


class FailingFiles(Files):
    """Fails at the steps that a test names."""

    def __init__(self):
        self.failing = set()
        self.steps = []

    def sync_folder(self, path):
        self._step("sync folder")
        super().sync_folder(path)

    def open(self, path, flags):
        self._step("claim" if flags & os.O_EXCL else "open")
        return super().open(path, flags)

    def rename(self, path, target):
        self._step("rename")
        super().rename(path, target)

    def write(self, fd, data):
        self._step("write")
        return super().write(fd, data)

    def _step(self, name):
        self.steps.append(name)
        if name in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def files():
    return FailingFiles()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def opened(path, log, clock, files):
    sinks = []

    def open_it(rotate="daily", time_zone="UTC"):
        config = FileConfig(type="file", path=str(path), rotate=rotate, time_zone=time_zone)
        sinks.append(FileSink("archive", config, sink_context(log, wall=clock), files=files))
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.fixture
def write(clock, path):
    """Delivers an event at a local time, and sets the file's modification time to it."""

    def deliver(sink, number, at, time_zone="UTC", fold=0):
        clock.now = datetime.fromisoformat(at).replace(tzinfo=ZoneInfo(time_zone), fold=fold).timestamp()
        sink.deliver([event(number)], 5.0)
        os.utime(path, (clock.now, clock.now))

    return deliver


def numbers_in(folder):
    """The numbers of the events in each file, by the suffix of its name."""
    by_line = {event(number).body: number for number in range(20)}
    return {
        found.name.removeprefix("events.jsonl"): [by_line[line] for line in found.read_bytes().splitlines()]
        for found in folder.glob("events.jsonl*")
        if not found.name.endswith(".lock")
    }


def recovered(sink, mark):
    known = {event(number).key: number for number in range(20)}
    return [known[key] for portion in sink.recover(mark, [None]) for key in portion.keys]


# --- configuration ---


@pytest.mark.parametrize("bad", ["", "Mars/Olympus", "../UTC", "/etc/passwd", "Europe", "UTC\0", "+08:00"])
def test_what_is_not_a_time_zone_is_refused_with_an_example(bad):
    with pytest.raises(ValidationError, match=r"is not a time zone \(write its IANA name, such as"):
        FileConfig(type="file", path="x.jsonl", time_zone=bad)


def test_a_period_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="rotate"):
        FileConfig(type="file", path="x.jsonl", rotate="weekly")


@pytest.mark.parametrize("name", ["UTC", "Asia/Shanghai"])
def test_time_zones_need_no_database_of_the_system(name):
    zoneinfo.reset_tzpath(to=())
    try:
        assert ZoneInfo.no_cache(name).key == name
    finally:
        zoneinfo.reset_tzpath()


# --- obstacles to a rename ---


@pytest.mark.parametrize(
    "make", [lambda it: it.write_bytes(b"of a person"), lambda it: it.mkdir(), lambda it: it.symlink_to("/nowhere")]
)
def test_an_existing_name_is_kept_and_the_file_is_not_renamed(opened, write, tmp_path, path, lines, make):
    sink = opened()
    write(sink, 1, "2026-11-25T23:59:59")
    taken = tmp_path / "events.jsonl-20261125"
    make(taken)
    before = taken.lstat()
    write(sink, 2, "2026-11-26T00:00:00")
    assert taken.lstat().st_ino == before.st_ino
    assert taken.lstat().st_size == before.st_size
    assert path.read_bytes() == event(1).body + b"\n" + event(2).body + b"\n"
    write(sink, 3, "2026-11-27T00:00:00")
    assert path.read_bytes() == event(3).body + b"\n"
    (log_line,) = named(lines, "file.unrotated")
    assert f"could not be renamed to {taken}: File exists" in log_line["message"]


@pytest.mark.parametrize("failing", ["claim", "rename"])
def test_a_file_that_cannot_be_renamed_is_continued_with_a_warning(opened, write, files, tmp_path, lines, failing):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    files.failing = {failing}
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"": [1, 2]}
    assert len(named(lines, "file.unrotated")) == 1
    files.failing = set()
    write(sink, 3, "2026-11-27T12:00:00")
    assert numbers_in(tmp_path) == {"-20261126": [1, 2], "": [3]}


def test_a_new_file_that_cannot_be_opened_is_tried_again(opened, write, files, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    mark = sink.position()
    files.failing = {"open"}
    for _ in range(2):
        with pytest.raises(TransientError, match="nothing was written"):
            write(sink, 2, "2026-11-26T12:00:00")
    assert sink.position() == mark
    files.failing = set()
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


def test_an_append_that_failed_after_a_rename_is_in_one_file(opened, write, files, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    mark = sink.position()
    files.failing = {"write"}
    with pytest.raises(TransientError):
        write(sink, 2, "2026-11-26T12:00:00")
    assert sink.position() == mark
    files.failing = set()
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


def test_the_new_name_is_synced_before_a_new_file_is_made(opened, write, files):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    files.steps.clear()
    write(sink, 2, "2026-11-26T12:00:00")
    assert files.steps == ["claim", "rename", "sync folder", "open", "sync folder", "write"]


def test_a_new_name_that_cannot_be_synced_is_tried_again(opened, write, files, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    files.failing = {"sync folder"}
    with pytest.raises(TransientError):
        write(sink, 2, "2026-11-26T12:00:00")
    files.failing = set()
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


# --- days and hours ---


@pytest.mark.parametrize(
    ("rotate", "before", "after", "name"),
    [
        ("daily", "2026-12-31T23:59:59.999999", "2027-01-01T00:00:00", "-20261231"),
        ("hourly", "2026-11-25T23:59:59.999999", "2026-11-26T00:00:00", "-2026112523"),
        ("hourly", "2026-11-25T09:59:59.999999", "2026-11-25T10:00:00", "-2026112509"),
        ("hourly", "2026-11-25T09:00:00", "2026-11-29T09:00:00", "-2026112509"),
        ("daily", "2026-11-01T00:00:00", "2026-11-29T09:00:00", "-20261101"),
    ],
)
@pytest.mark.parametrize("time_zone", ["UTC", "Asia/Shanghai", "America/St_Johns"])
def test_the_first_line_after_a_period_is_in_a_new_file(
    opened, write, tmp_path, lines, rotate, before, after, name, time_zone
):
    sink = opened(rotate, time_zone)
    write(sink, 1, before, time_zone)
    write(sink, 2, before, time_zone)
    write(sink, 3, after, time_zone)
    write(sink, 4, after, time_zone)
    assert numbers_in(tmp_path) == {name: [1, 2], "": [3, 4]}
    (log_line,) = named(lines, "file.rotated")
    assert log_line["renamed_to"] == str(tmp_path / f"events.jsonl{name}")


def test_without_a_period_a_file_is_never_renamed(opened, write, tmp_path):
    sink = opened("none")
    write(sink, 1, "2026-11-25T12:00:00")
    write(sink, 2, "2036-11-25T12:00:00")
    assert numbers_in(tmp_path) == {"": [1, 2]}


def test_a_file_without_lines_is_not_renamed(opened, write, clock, tmp_path):
    clock.now = datetime(2026, 11, 25, tzinfo=UTC).timestamp()
    sink = opened()
    write(sink, 1, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"": [1]}


@pytest.mark.parametrize("rotate", ["daily", "hourly"])
def test_a_clock_that_is_set_back_over_midnight_rotates_once(opened, write, tmp_path, rotate):
    sink = opened(rotate)
    write(sink, 1, "2026-11-25T23:59:58")
    write(sink, 2, "2026-11-26T00:00:05")
    write(sink, 3, "2026-11-25T23:59:50")
    write(sink, 4, "2026-11-26T00:00:00")
    name = {"daily": "-20261125", "hourly": "-2026112523"}[rotate]
    assert numbers_in(tmp_path) == {name: [1], "": [2, 3, 4]}


def test_a_restart_after_a_clock_set_back_overwrites_nothing(opened, write, tmp_path):
    sink = opened("hourly")
    write(sink, 1, "2026-11-25T10:59:58")
    write(sink, 2, "2026-11-25T11:00:05")
    write(sink, 3, "2026-11-25T10:59:59")
    sink.close()
    sink = opened("hourly")
    write(sink, 4, "2026-11-25T11:00:05")
    assert numbers_in(tmp_path) == {"-2026112510": [1], "": [2, 3, 4]}
    write(sink, 5, "2026-11-25T12:00:00")
    assert numbers_in(tmp_path) == {"-2026112510": [1], "-2026112511": [2, 3, 4], "": [5]}


def test_the_repeated_hour_at_the_end_of_summer_time_is_one_file(opened, write, tmp_path):
    sink = opened("hourly", BERLIN)
    write(sink, 1, "2026-10-25T01:59:59", BERLIN)
    write(sink, 2, "2026-10-25T02:00:00", BERLIN)
    write(sink, 3, "2026-10-25T02:59:59", BERLIN)
    write(sink, 4, "2026-10-25T02:00:00", BERLIN, fold=1)
    write(sink, 5, "2026-10-25T02:59:59", BERLIN, fold=1)
    write(sink, 6, "2026-10-25T03:00:00", BERLIN)
    assert numbers_in(tmp_path) == {"-2026102501": [1], "-2026102502": [2, 3, 4, 5], "": [6]}


def test_a_day_whose_last_hour_comes_twice_is_one_file(opened, write, tmp_path):
    zone = "America/Asuncion"  # until 2024: at the end of summer time 24:00 became 23:00 of the same day
    sink = opened("daily", zone)
    write(sink, 1, "2024-03-23T23:30:00", zone)
    write(sink, 2, "2024-03-23T23:30:00", zone, fold=1)
    write(sink, 3, "2024-03-24T00:00:00", zone)
    assert numbers_in(tmp_path) == {"-20240323": [1, 2], "": [3]}


def test_a_reload_renames_a_file_whose_period_is_over(opened, write, clock, path, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    clock.advance(86_400)
    sink.reopen()
    assert numbers_in(tmp_path) == {"-20261125": [1], "": []}


def test_after_a_rename_by_logrotate_the_new_file_is_kept(opened, write, path, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    path.rename(tmp_path / "events.jsonl.1")
    path.touch()
    write(sink, 2, "2026-11-26T12:00:00")
    write(sink, 3, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {".1": [1], "": [2, 3]}


# --- restarts ---


def test_after_a_restart_in_a_new_period_lines_are_in_a_new_file(opened, write, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    sink.close()
    write(opened(), 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


def test_a_repaired_file_has_the_name_of_its_own_day(opened, write, path, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    mark = sink.position()
    sink.close()
    changed_at = path.stat().st_mtime
    with path.open("ab") as file:
        file.write(b'{"torn')
    os.utime(path, (changed_at, changed_at))
    sink = opened()
    assert recovered(sink, mark) == []
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


def test_an_empty_file_that_a_crash_left_is_replaced(opened, write, tmp_path):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    (tmp_path / "events.jsonl-20261125").touch()
    write(sink, 2, "2026-11-26T12:00:00")
    assert numbers_in(tmp_path) == {"-20261125": [1], "": [2]}


@pytest.mark.parametrize("has_new_file", [False, True])
def test_lines_after_the_mark_are_found_in_the_renamed_file(opened, write, path, tmp_path, has_new_file):
    sink = opened()
    write(sink, 1, "2026-11-25T12:00:00")
    mark = sink.position()
    write(sink, 2, "2026-11-25T13:00:00")
    if has_new_file:
        write(sink, 3, "2026-11-26T12:00:00")
    else:
        path.rename(tmp_path / "events.jsonl-20261125")
    sink.close()
    assert recovered(opened(), mark) == ([2, 3] if has_new_file else [2])


def test_with_a_clock_set_back_all_files_since_the_mark_are_read(opened, write, tmp_path):
    sink = opened("hourly")
    write(sink, 1, "2026-11-25T10:59:00")
    mark = sink.position()
    write(sink, 2, "2026-11-25T10:59:50")
    write(sink, 3, "2026-11-25T11:00:05")
    write(sink, 4, "2026-11-25T10:30:00")
    write(sink, 5, "2026-11-25T12:00:00")
    sink.close()
    assert numbers_in(tmp_path) == {"-2026112510": [1, 2], "-2026112511": [3, 4], "": [5]}
    assert recovered(opened("hourly"), mark) == [2, 3, 4, 5]
