"""`check --connect` checks the permissions of files, the expiry of certificates, and free disk space."""

import os
import pwd
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.certificates import make_certificate
from tests.receiver import running_receiver
from vodpoller.checkup.certificates import check_ca_files, check_endpoint
from vodpoller.checkup.disks import check_disks
from vodpoller.checkup.files import check_files
from vodpoller.checkup.finding import Level
from vodpoller.config.load import from_dict
from vodpoller.vod.client import VodClient

NOBODY = pwd.getpwnam("nobody")
needs_root = pytest.mark.skipif("os.getuid() != 0", reason="only root can change the owner of files")
DAY_SECS = 86_400


def config_in(folder, **tables):
    return from_dict(
        {
            "credentials": {"secret_id": "AKIDexample", "secret_key_file": "secret_key"},
            "sources": [{"name": "main"}],
            "routes": [{"name": "all", "sinks": ["archive", "out"]}],
            "sinks": {"archive": {"type": "file", "path": f"{folder}/archive/x.jsonl"}, "out": {"type": "stdout"}},
            "journal": {"path": f"{folder}/state/journal.db"},
            **tables,
        },
        where="test",
        base=Path(folder),
        env={},
    )


@pytest.fixture
def folder(tmp_path):
    """A folder that every user can reach and enter, with a key, a journal and a sink's file."""
    for place in (tmp_path, *tmp_path.parents):
        if place.owner() == pwd.getpwuid(os.geteuid()).pw_name and place != Path("/"):
            place.chmod(0o755 if place.name != "tmp" else place.stat().st_mode)
    for name in ("secret_key", "state/journal.db", "state/journal.db-wal", "archive/x.jsonl", "archive/x.jsonl.lock"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, mode=0o755)
        file.write_text("the-secret-key")
        file.chmod(0o640)
    return tmp_path


def found_in(folder, *, as_root=False):
    found = list(check_files(config_in(folder), as_root=as_root))
    assert {finding.what for finding in found} == {"files"}
    return [(finding.text, finding.remedy) for finding in found if finding.level is not Level.GOOD]


def test_a_secret_that_everyone_can_read_is_a_warning(folder):
    path = folder / "secret_key"
    path.chmod(0o644)
    assert found_in(folder) == [(f"every user of this machine can read the secret in {path}", f"chmod o= {path}")]


@pytest.mark.parametrize(
    "name", ["state/journal.db", "state/journal.db-wal", "archive/x.jsonl", "archive/x.jsonl.lock"]
)
def test_a_file_that_everyone_can_write_is_a_warning(folder, name):
    path = folder / name
    path.chmod(0o666)
    assert found_in(folder) == [(f"every user of this machine can write {path}", f"chmod o-w {path}")]


@pytest.mark.parametrize(("mode", "warns"), [(0o777, True), (0o1777, False), (0o775, False)])
@pytest.mark.parametrize("name", ["state", "archive"])
def test_a_folder_in_which_everyone_can_replace_files_is_a_warning(folder, name, mode, warns):
    path = folder / name
    path.chmod(mode)
    text = f"every user of this machine can replace the files in {path}"
    assert found_in(folder) == ([(text, f"chmod o-w {path}")] if warns else [])


def test_files_in_a_folder_that_others_cannot_enter_are_safe(folder):
    (folder / "secret_key").chmod(0o644)
    (folder / "archive/x.jsonl").chmod(0o666)
    folder.chmod(0o750)
    assert found_in(folder) == []


@pytest.mark.parametrize("gone", [["state", "archive"], ["archive"], []])
def test_safe_files_are_one_good_finding_also_before_the_first_start(folder, gone):
    for name in gone:
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    (finding,) = check_files(config_in(folder), as_root=True)
    assert finding.level is Level.GOOD


def change_owner(path, *, uid=NOBODY.pw_uid, gid=NOBODY.pw_gid):
    os.chown(path, uid, gid)


@needs_root
@pytest.mark.parametrize("name", ["state/journal.db-wal", "archive/x.jsonl.lock", "archive"])
@pytest.mark.parametrize("uid", [NOBODY.pw_uid, 61_234])
def test_root_sees_what_the_owner_of_the_journals_folder_cannot_write(folder, name, uid):
    for path in (folder, *folder.rglob("*")):
        change_owner(path, uid=uid)
    path = folder / name
    change_owner(path, uid=0, gid=0)
    ((text, remedy),) = found_in(folder, as_root=True)
    named = "nobody" if uid == NOBODY.pw_uid else "with the id 61234"
    assert text.startswith(f"{path} cannot be written by the user {named}, who owns the journal's folder")
    assert remedy.endswith(f"chown {uid} {path}")
    assert found_in(folder, as_root=False) == []
    (finding,) = check_files(config_in(folder), as_root=True)
    assert finding.level is (Level.PROBLEM if name.startswith("state/") else Level.WARNING)


@needs_root
@pytest.mark.parametrize("mode", [0o660, 0o666])
def test_a_file_that_group_or_everyone_can_write_keeps_its_owner(folder, mode):
    folder.chmod(0o750)
    for path in (folder, *folder.rglob("*")):
        change_owner(path)
    os.chown(folder / "archive/x.jsonl", 0, NOBODY.pw_gid if mode == 0o660 else 0)
    (folder / "archive/x.jsonl").chmod(mode)
    assert found_in(folder, as_root=True) == []


def test_a_folder_in_a_files_place_is_left_to_the_other_checks(folder):
    (folder / "archive/x.jsonl").unlink()
    (folder / "archive/x.jsonl").mkdir(mode=0o777)
    assert found_in(folder, as_root=True) == []


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.system
@pytest.mark.parametrize(("days", "warned"), [(2, True), (13, True), (40, False)])
def test_a_ca_file_that_expires_soon_is_a_warning(tmp_path, folder, days, warned):
    path = make_certificate(tmp_path, days=days).path
    hook = {"type": "webhook", "url": "https://app.example", "ca_file": str(path)}
    config = config_in(folder, api={"ca_file": str(path)}, sinks={"archive": hook, "out": {"type": "stdout"}})
    found = list(check_ca_files(config, time.time()))
    assert [finding.what for finding in found] == ["api.ca_file", "sinks.archive.ca_file"]
    assert {finding.level for finding in found} == {Level.WARNING if warned else Level.GOOD}
    assert all((" ends on " in finding.text) == warned for finding in found)


@pytest.mark.system
def test_an_expired_ca_file_is_reported_as_expired(tmp_path, folder):
    lasting = make_certificate(tmp_path, days=400).path.read_text()
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(make_certificate(tmp_path, days=2).path.read_text() + lasting)
    config = config_in(folder, api={"ca_file": str(bundle)})
    (finding,) = check_ca_files(config, time.time() + 3 * DAY_SECS)
    assert finding.text.startswith(f"1 of 2 certificates in {bundle}: the first has ended on ")


@pytest.mark.system
def test_a_ca_file_that_is_gone_is_a_problem(tmp_path, folder):
    path = make_certificate(tmp_path).path
    config = config_in(folder, api={"ca_file": str(path)})
    path.unlink()
    (finding,) = check_ca_files(config, time.time())
    assert finding.level is Level.PROBLEM
    assert finding.text == f"{path} cannot be read: No such file or directory"


def client_at(url, log, **settings):
    return closing(VodClient(endpoint=url, credentials=lambda: None, log=log, **settings))


@pytest.mark.system
@pytest.mark.parametrize(("days", "level"), [(2, Level.WARNING), (40, Level.GOOD)])
def test_the_expiry_of_the_endpoints_certificate_is_shown(tmp_path, log, days, level):
    certificate = make_certificate(tmp_path, days=days)
    with running_receiver() as vod:
        url = certificate.serve(vod).removesuffix("/callback")
        with client_at(url, log, ca_file=certificate.path) as client:
            (finding,) = check_endpoint(client, time.time())
        assert vod.received == []
    assert finding.level is level
    assert finding.text.endswith("(1 day)" if days == 2 else "(39 days)")


def test_an_endpoint_without_tls_gets_no_connection(log):
    with running_receiver() as vod:
        with client_at(vod.url.removesuffix("/callback"), log) as client:
            assert list(check_endpoint(client, time.time())) == []
        assert vod.connections == []


def test_an_unreachable_endpoint_is_left_to_its_sources_check(log):
    with client_at("https://127.0.0.1:1", log) as client:
        assert list(check_endpoint(client, time.time())) == []


# --- disks ------------------------------------------------------------------------------------------------------------


def disk(*, free_blocks=2**40, files=1000, free_files=1000):
    """Replaces `os.statvfs`: a file system with blocks of 1 KiB."""
    return lambda _: os.statvfs_result((1024, 1024, 2**41, 2**41, free_blocks, files, free_files, free_files, 0, 255))


@pytest.mark.parametrize(
    ("state", "lacking"), [({"free_blocks": 0}, "no space left"), ({"free_files": 0}, "no inodes left")]
)
def test_a_full_disk_is_a_problem(folder, state, lacking):
    (found,) = check_disks(config_in(folder), look=disk(**state))
    assert (found.what, found.level) == (f"disk of {folder}/state", Level.PROBLEM)
    assert lacking in found.text
    assert "df -h" in found.remedy


def test_a_disk_with_less_room_than_the_journal_needs_is_a_warning(folder):
    config = config_in(folder, journal={"path": f"{folder}/state/journal.db", "max_bytes": 2**30})
    (found,) = check_disks(config, look=disk(free_blocks=2**19))
    assert found.level is Level.WARNING
    assert found.text == "it has 512 MiB left, and the journal may grow by 1023 MiB (journal.max_bytes)"


def test_a_disk_that_does_not_count_inodes_has_room(folder):
    (found,) = check_disks(config_in(folder), look=disk(files=0, free_files=0))
    assert found.level is Level.GOOD


def test_the_real_disk_can_be_checked(folder):
    assert [found.what for found in check_disks(config_in(folder))] == [f"disk of {folder}/state"]
