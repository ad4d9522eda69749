"""Confirmed events are on disk after a loss of power, whatever part of the unsynced data survives."""

from itertools import islice

import pytest

from tests.model.sampling import STRIDE
from tests.model.world import World, folder_in_memory

FULL = 2


class Disk:
    """The possible contents of the sink's file and of the journal's two files after a loss of power, at each moment.

    Bytes of the sink's file are safe once they are synced. Those of the journal's WAL are safe up to the last commit
    that synced it, according to SQLite's own setting; the database changes only at checkpoints, which sync both files.

    Args:
        world: A world that is already open.
    """

    def __init__(self, world):
        self.images = {}
        self._world = world
        self._archive_sure = b""
        self._archive_since = [b""]
        self._journal_sure = self._journal()
        files, check_confirm = world.files, world.check_confirm
        write, sync, truncate = files.write, files.fdatasync, files.ftruncate

        def recorded_write(fd, data):
            try:
                return write(fd, data)
            finally:
                self._archive_changed()

        def recorded_truncate(fd, length_bytes):
            truncate(fd, length_bytes)
            self._archive_changed()

        def recorded_sync(fd):
            sync(fd)
            self._archive_sure = world.archive.read_bytes()
            self._archive_since = [self._archive_sure]
            self._take_images()

        def recorded_commit(connection):
            (level,) = connection.execute("PRAGMA synchronous").fetchone()
            if level >= FULL:
                self._journal_sure = self._journal()
            self._take_images()

        def recorded_confirm(event):
            check_confirm(event)
            event.confirmed = True
            self._take_images()

        files.write, files.fdatasync, files.ftruncate = recorded_write, recorded_sync, recorded_truncate
        world.journal_committed, world.check_confirm = recorded_commit, recorded_confirm

    def _journal(self):
        wal = self._world.folder / "journal.db-wal"
        return self._world.journal_path.read_bytes(), wal.read_bytes() if wal.exists() else b""

    def _archive_changed(self):
        self._archive_since.append(self._world.archive.read_bytes())
        self._take_images()

    def _take_images(self):
        """Combine each possible state of a file with the other file without, and with all of, its unsynced data."""
        forgotten = frozenset(event.number for event in self._world.queue.events if event.confirmed)
        archives, journals = self._archives(), self._journals()
        pairs = [(archive, journal) for archive in archives for journal in (journals[0], journals[-1])]
        pairs += [(archive, journal) for archive in (archives[0], archives[-1]) for journal in journals]
        for archive, journal in pairs:
            self.images[archive, journal, forgotten] = tuple(self._world.plain_accepted)

    def _archives(self):
        images = {self._archive_sure: None}
        for now in self._archive_since:
            sure = len(self._archive_sure)
            assert now.startswith(self._archive_sure)
            ends = [at + 1 for at in range(sure, len(now)) if now[at : at + 1] == b"\n"]
            cuts = {sure, *ends, *(end - 1 for end in ends), *(end - 40 for end in ends), len(now)}
            for cut in sorted(cut for cut in cuts if cut >= sure):
                images[now[:cut]] = None
                images[now[:cut] + bytes(len(now) - cut)] = None  # the length reached the disk, the blocks did not
                images[now[:sure] + bytes(cut - sure) + now[cut:]] = None  # a later block did, an earlier did not
        images.pop(self._archive_since[-1], None)
        images[self._archive_since[-1]] = None
        return list(images)

    def _journals(self):
        database, sure = self._journal_sure
        now_database, now = self._journal()
        if now_database != database or not now.startswith(sure):
            return [(now_database, now)]  # a checkpoint has synced both
        middle = (len(sure) + len(now)) // 2
        logs = [sure, now[:middle], now[:middle] + bytes(len(now) - middle), sure + bytes(len(now) - len(sure)), now]
        return [(database, log) for log in dict.fromkeys(logs)]


def booted_from(image, plain_accepted, dead_world, *, renamed):
    """A new boot with this disk image. VOD's queue and the plain sink have the state that they had at that moment."""
    archive, (database, log), forgotten = image
    world = World(dead_world.folder)
    rotated = world.folder / "events.jsonl.1"
    if rotated.exists():
        rotated.replace(world.archive)
    world.archive.write_bytes(archive)  # rewritten in place, so that it keeps its inode
    for name, content in (("journal.db", database), ("journal.db-wal", log), ("journal.db-shm", b"")):
        path = world.folder / name
        path.write_bytes(content) if content else path.unlink(missing_ok=True)
    if renamed:
        world.archive.rename(rotated)
    for event in dead_world.queue.events:
        world.queue.feed(event.content["EventType"])
        world.queue.events[-1].confirmed = event.number in forgotten
    world.plain_accepted += plain_accepted
    world.excused |= set(plain_accepted)  # a lost ledger row causes a duplicate at this sink only
    world.clock.now, world.wall.now = dead_world.clock.now, dead_world.wall.now
    world.start()
    world.stage.run()
    return world


def not_held(world):
    """Confirmed events with each sink that neither has the event nor will get it from the journal."""
    archived, letters = world.archived(), set(world.rows("letters"))
    has = {"file": archived, "plain": world.plain_accepted, "": []}
    return [
        (event.number, sink)
        for event in world.queue.events
        if event.confirmed
        for sink in event.sinks
        if event.key not in has[sink] and (event.key, sink) not in letters
    ]


# --- stories ----------------------------------------------------------------------------------------------------------


def all_is_well(world):
    for _ in range(3):
        world.pull()
        world.stage.run()
        world.queue.feed("File")
        world.queue.feed("Both")
    world.pull()
    world.stage.run()


def the_plain_sink_is_down_and_comes_back(world):
    world.plain_script.extend(["transient"] * 20)
    world.pull()
    world.stage.run()
    world.advance(26)
    world.stage.run()
    world.plain_script.clear()
    for _ in range(6):
        world.advance(31)
        world.keep_up()
        world.stage.run()


def the_file_fails_and_recovers(world):
    world.files.write_script.append("full")
    world.files.sync_script.append("fails")
    world.pull()
    world.stage.run()
    for secs in (3, 6, 26):
        world.advance(secs)
        world.stage.run()
    world.keep_up()
    world.stage.run()


def the_file_fails_until_the_lease_ends(world):
    world.files.write_script.extend(["full"] * 40)
    world.pull()
    world.stage.run()
    world.advance(26)
    world.stage.run()
    world.files.write_script.clear()
    for _ in range(6):
        world.advance(31)
        world.keep_up()
        world.stage.run()


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize(
    "story",
    [
        all_is_well,
        the_plain_sink_is_down_and_comes_back,
        the_file_fails_and_recovers,
        the_file_fails_until_the_lease_ends,
    ],
)
def test_power_loss_loses_no_event_and_tears_or_doubles_no_line(story, renamed):
    with folder_in_memory() as folder:
        dead_world = World(folder)
        try:
            for kind in ("Both", "File", "Plain", "Unrouted", "Both"):
                dead_world.queue.feed(kind)
            dead_world.start()
            dead_world.stage.run()
            disk = Disk(dead_world)
            story(dead_world)
            assert not dead_world.violations
            assert all(event.confirmed for event in dead_world.queue.events)
        finally:
            dead_world.end()
        assert len(disk.images) > 30
        for image, plain_accepted in islice(disk.images.items(), len(story.__name__) % STRIDE, None, STRIDE):
            world = booted_from(image, plain_accepted, dead_world, renamed=renamed)
            try:
                assert world.is_up, f"it does not start with the file {image[0]!r}"
                assert not_held(world) == [], f"the file was {image[0]!r}"
                world.run_dry()
                world.check_end()
            finally:
                world.end()
