"""SIGKILL at each step of the daemon: each event is in the file exactly once."""

import json
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from itertools import count

import pytest

from tests.model.world import World, folder_in_memory
from tests.polling import until
from tests.processes import bodies_of, differences
from tests.receiver import SlowReceiver, running_receiver

LEASE_SECS = 1.2


def bodies(count, *, first):
    return [
        json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number), "Name": "x" * 40}})
        for number in range(first, first + count)
    ]


def dies(system, failpoint, *, meanwhile=lambda daemon: None, feed=lambda: None):
    """Run the daemon until its failpoint has killed it; `feed` causes further writes, syncs and confirms."""
    daemon = system.daemon(started=False, failpoint=failpoint)
    meanwhile(daemon)

    def has_died():
        feed()
        return daemon.process.poll() is not None

    until(has_died, secs=30, every_secs=0.3, what=daemon.tail)
    assert daemon.process.returncode == -signal.SIGKILL, daemon.tail()


def assert_all_arrived_once(system, simulator, *, and_until=lambda: True):
    """Run a daemon without failpoints until everything is delivered, and check the files."""
    daemon = system.daemon()
    system.await_archived(simulator)
    until(and_until, secs=60, what=daemon.tail)
    exit_code, _ = daemon.terminate()
    assert exit_code == 0
    assert differences(bodies_of(simulator.ledger(bodies=True)), system.lines_of_all_files()) == ([], [])
    for path in system.folder.glob("events.jsonl*"):
        data = path.read_bytes()
        assert not data or data.endswith(b"\n")
        assert b"\0" not in data
    assert daemon.log("puller.failed") == daemon.log("worker.failed") == []


@pytest.mark.long
@pytest.mark.parametrize(
    "failpoints",
    [
        ["write:before:2", "write:amid:3", "write:after:2", "write:amid:1"],
        ["sync:before:3", "sync:after:4", "sync:before:1", "sync:after:1"],
        ["ledger:before:1", "ledger:after:2"],
        ["confirm:before:1", "confirm:after:2"],
        ["write:amid:2", "cut:before:1", "cut:after:1", "recover:before:1", "recover:after:1", "open:after:1"],
    ],
    ids=lambda failpoints: "-".join(dict.fromkeys(failpoint.split(":")[0] for failpoint in failpoints)),
)
def test_killed_around_each_step_each_event_is_in_the_file_once(system, failpoints):
    # Small batches and several pullers: the worker writes the events of several pulls at once.
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2, batch=4, rtt_secs=0.01)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    numbers = count(10_000, 4)
    for number, failpoint in enumerate(failpoints):
        simulator.feed(*bodies(60, first=60 * number))
        dies(system, failpoint, feed=lambda: simulator.feed(*bodies(4, first=next(numbers))))
    assert_all_arrived_once(system, simulator)


def test_killed_before_the_ledger_each_event_is_one_row_counted_once(system):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2, batch=4)
    path = system.folder / "rows.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE counted (number INTEGER)")
        db.execute("INSERT INTO counted VALUES (0)")
        db.commit()
    common = f'type = "sqlite"\npath = "{path}"\ncreate_table = true\n'
    statement = 'statement = "UPDATE counted SET number = number + 1"\n'
    sinks = f"[sinks.rows]\n{common}[sinks.counted]\n{common}{statement}"
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=sinks)
    numbers = count(10_000, 4)
    for number, failpoint in enumerate(["ledger:before:1:rows", "ledger:before:2:counted", "ledger:after:3:counted"]):
        simulator.feed(*bodies(30, first=30 * number))
        dies(system, failpoint, feed=lambda: simulator.feed(*bodies(4, first=next(numbers))))
    daemon = system.daemon()
    until(simulator.all_confirmed, what=daemon.tail)
    fed = simulator.stats()["fed"]
    with closing(sqlite3.connect(path)) as db:
        until(lambda: db.execute("SELECT count(*) FROM vodpoller_events").fetchone() == (fed,), what=daemon.tail)
        until(lambda: db.execute("SELECT count(*) FROM vodpoller_inbox").fetchone() == (fed,), what=daemon.tail)
        assert db.execute("SELECT number FROM counted").fetchone() == (fed,)
    assert daemon.terminate()[0] == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_a_reopen_each_event_is_in_one_file_once(system, when):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    simulator.feed(*bodies(30, first=0))

    def rotate(daemon):
        daemon.await_log("daemon.started")
        until(lambda: len(system.lines()) == 30)
        simulator.feed(*bodies(30, first=30))
        system.archive.rename(f"{system.archive}.1")
        daemon.signal(signal.SIGHUP)

    dies(system, f"reopen:{when}:1", meanwhile=rotate)
    assert_all_arrived_once(system, simulator)


@pytest.mark.parametrize("failpoint", ["write:amid:2", "sync:before:3", "ledger:before:2"])
def test_a_rename_after_a_kill_tears_loses_and_doubles_nothing(system, failpoint):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2, batch=4)
    system.configure(simulator.url, lease_secs=LEASE_SECS)
    simulator.feed(*bodies(60, first=0))
    dies(system, failpoint)
    system.archive.rename(f"{system.archive}.1")
    assert_all_arrived_once(system, simulator)


@pytest.mark.long
@pytest.mark.parametrize(
    "failpoints",
    [
        ["open:before:2", "open:after:2", "rename:before:1", "rename:after:1"],
        ["open:before:3", "open:after:3", "write:amid:1", "write:after:1", "ledger:before:1"],
    ],
    ids=["renaming", "in the new file"],
)
def test_killed_at_each_step_of_a_rotation_an_event_is_there_once(system, failpoints):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2)
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=system.archive_sink + 'rotate = "hourly"\n')
    for number, failpoint in enumerate(failpoints):
        simulator.feed(*bodies(10, first=20 * number))
        dies(system, "ledger:before:1")
        hour = time.time() - (100 - number) * 3600
        os.utime(system.archive, (hour, hour))
        simulator.feed(*bodies(10, first=20 * number + 10))
        dies(system, failpoint)
    assert_all_arrived_once(system, simulator)
    assert len([path for path in system.folder.glob("events.jsonl-*") if path.stat().st_size]) >= 3


def test_killed_around_a_store_each_event_is_in_the_file_once(system):
    simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2, batch=4)
    dead = '[sinks.hook]\ntype = "webhook"\nurl = "http://127.0.0.1:9/nothing"\nbreaker_failures = 1\n'
    system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=system.archive_sink + dead)
    for number, failpoint in enumerate(["store:before:1", "store:after:2"]):
        simulator.feed(*bodies(30, first=30 * number))
        dies(system, failpoint)
    assert_all_arrived_once(system, simulator)


@pytest.mark.parametrize(
    "failpoints",
    [
        ["store:before:1", "store:after:2"],
        ["ledger:before:1", "confirm:before:2", "confirm:after:1"],
        ["write:amid:3", "sync:after:1"],
    ],
    ids=lambda failpoints: "-".join(dict.fromkeys(failpoint.split(":")[0] for failpoint in failpoints)),
)
@pytest.mark.long
def test_killed_beside_a_slow_sink_each_event_reaches_both_sinks(system, failpoints):
    # A late answer comes after the end of the lease: the event is stored, and the daemon is killed during the delivery.
    with running_receiver(SlowReceiver(every=5, after_secs=2 * LEASE_SECS)) as receiver:
        simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2, batch=4)
        slow = f'[sinks.slow]\ntype = "webhook"\nurl = "{receiver.url}"\nconcurrency = 8\ntimeout_secs = 4\n'
        system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=system.archive_sink + slow)
        numbers = count(10_000, 4)
        for number, failpoint in enumerate(failpoints):
            simulator.feed(*bodies(20, first=20 * number))
            dies(system, failpoint, feed=lambda: simulator.feed(*bodies(4, first=next(numbers))))
        fed = simulator.stats()["fed"]
        assert_all_arrived_once(system, simulator, and_until=lambda: len(receiver.accepted_ids()) == fed)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.long
def test_cut_at_any_byte_of_a_batch_the_file_gets_each_event_once(renamed):
    with folder_in_memory() as folder:
        world, whole, mark, journal = two_batches(folder)
        tails = [whole[:cut] for cut in range(mark, len(whole) + 1)]
        ends = [mark, whole.index(b"\n", mark) + 1, len(whole) - 1, len(whole)]
        tails += [whole[:end] + bytes(zeros) for end in ends for zeros in (1, 511, 4096)]
        tails += [whole[:mark] + bytes(end - mark) + whole[end:] for end in ends]
        for tail in tails:
            restarted(world, tail, journal, renamed=renamed)


def two_batches(folder):
    """A world whose second batch is only in the file, not in the journal.

    Returns:
        The world, the content of the file, the offset of the second batch, and a copy of the journal from before it.
    """
    world = World(folder)
    world.start()
    world.stage.run()
    for kind in ("File", "File"):
        world.queue.feed(kind)
    world.pull()
    world.stage.run()
    mark = world.archive.stat().st_size
    world.journal.flush()
    journal = world.folder / "before.db"
    world.journal.commits.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(world.journal_path, journal)
    for kind in ("File", "File", "File"):
        world.queue.feed(kind)
    world.pull()
    world.stage.run()
    whole = world.archive.read_bytes()
    world.end()
    return world, whole, mark, journal


def restarted(world, content, journal, *, renamed):
    """Restart with this content of the file, and check that each event arrives once."""
    rotated = world.folder / "events.jsonl.1"
    if rotated.exists():
        rotated.replace(world.archive)
    world.archive.write_bytes(content)  # rewritten in place, so that it keeps its inode
    (world.folder / "journal.db-wal").unlink(missing_ok=True)
    shutil.copy(journal, world.journal_path)
    if renamed:
        world.archive.rename(rotated)
    for event in world.queue.events[2:]:
        event.confirmed, event.handle = False, None
    world.start()
    try:
        world.run_dry()
        world.check_end()
    finally:
        world.end()
