"""Folders that survive a loss of power, and locks; also on file systems that lack one of the two."""

import errno
import fcntl
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from vodpoller.durable import Folders, check_access, existing_folder, is_locked, kind_of_file, may_pass, take_lock, why


def failing_with(number):
    def fail(*_args):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def warnings():
    return []


# --- folders ---


def test_missing_folders_are_made_and_synced_into_their_parents(tmp_path, warnings):
    steps = []
    folders = Folders(
        warnings.append,
        make=lambda path: (steps.append(("make", path.name)), path.mkdir()),
        sync=lambda path: steps.append(("sync", path.name)),
    )
    folders.make(tmp_path / "one" / "two")
    folders.make(tmp_path / "one" / "two")
    assert steps == [("make", "one"), ("sync", tmp_path.name), ("make", "two"), ("sync", "one")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders_is_one_warning(tmp_path, monkeypatch, warnings, number):
    monkeypatch.setattr(os, "fsync", failing_with(number))
    folders = Folders(warnings.append)
    folders.make(tmp_path / "one" / "two")
    folders.sync(tmp_path)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        folders.sync(tmp_path, fd)
    finally:
        os.close(fd)
    assert (tmp_path / "one" / "two").is_dir()
    (line,) = warnings
    assert str(tmp_path) in line


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch, warnings, number):
    monkeypatch.setattr(os, "fsync", failing_with(number))
    with pytest.raises(OSError, match=r"error|space") as excinfo:
        Folders(warnings.append).make(tmp_path / "one")
    assert excinfo.value.errno == number
    assert warnings == []


@pytest.mark.parametrize("below", ["file", "file/one"])
def test_a_file_in_a_folders_place_is_named(tmp_path, warnings, below):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as excinfo:
        Folders(warnings.append).make(tmp_path / below)
    assert excinfo.value.filename == str(tmp_path / "file")


def test_a_new_folder_is_closed_to_other_users(tmp_path, warnings):
    before = os.umask(0)
    try:
        Folders(warnings.append).make(tmp_path / "one")
    finally:
        os.umask(before)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o750


# --- locks ---


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    path = tmp_path / "x.lock"
    assert not is_locked(path)
    assert not path.exists()
    fd = take_lock(path)
    assert is_locked(path)
    with pytest.raises(BlockingIOError, match=r"x\.lock"):
        take_lock(path, wait_secs=0)
    os.close(fd)
    assert not is_locked(path)
    os.close(take_lock(path, wait_secs=0))


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_lock_that_is_held_for_an_instant_is_waited_for(tmp_path, kind):
    path = tmp_path / "x.lock"
    path.touch()
    held = os.open(path, os.O_RDONLY)
    fcntl.flock(held, kind)
    timer = threading.Timer(0.1, os.close, (held,))
    timer.start()
    try:
        os.close(take_lock(path, wait_secs=30))
    finally:
        timer.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_a_held_lock(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing_with(number))
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=r"x\.lock") as excinfo:
        take_lock(tmp_path / "x.lock")
    assert excinfo.value.errno == number
    assert not isinstance(excinfo.value, BlockingIOError)
    assert not may_pass(excinfo.value)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


# --- error texts and access ---


def test_the_error_of_a_file_system_without_locks_has_a_remedy():
    assert "use a local disk" in why(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_an_error_that_can_end_by_itself_may_pass(number):
    assert may_pass(OSError(number, ""))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOLCK, errno.EISDIR])
def test_an_error_that_the_operator_must_correct_does_not_pass(number):
    assert not may_pass(OSError(number, ""))


def test_kinds_of_files_have_names(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert kind_of_file((tmp_path / "pipe").stat().st_mode) == "a named pipe"
    assert kind_of_file(tmp_path.stat().st_mode) == "a folder"
    assert kind_of_file(Path("/dev/null").stat().st_mode) == "a device"


def test_the_nearest_folder_that_exists_is_found(tmp_path):
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert existing_folder(tmp_path) == tmp_path


def test_a_file_within_the_path_is_not_a_folder(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError) as raised:
        existing_folder(tmp_path / "a" / "b")
    assert raised.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize(("read_only", "number"), [(False, errno.EACCES), (True, errno.EROFS)])
def test_check_access_raises_the_error_that_the_use_would_raise(tmp_path, monkeypatch, read_only, number):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY if read_only else 0))
    check_access(tmp_path, os.R_OK)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))) as raised:
        check_access(tmp_path, os.W_OK)
    assert raised.value.errno == number
