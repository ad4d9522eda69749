"""The daemon's parts with a model of VOD's queue, one step at a time: a crash may follow any step.

Each thread of the daemon is an actor here. One actor moves at a time, from one pause to the next. There is a pause
wherever another thread could run, or the process could end. The test chooses the actor that moves.
"""

import errno
import json
import os
import sqlite3
import tempfile
import threading
from collections import Counter, deque
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import SimpleNamespace

from tests.helpers import FakeClock, log_into, sink_context
from vodpoller.batch import Batch
from vodpoller.delivery.in_flight import DeliveryWait, InFlight, WaitEnd
from vodpoller.delivery.retrier import Retrier
from vodpoller.delivery.worker import Worker
from vodpoller.errors import (
    ConfigError,
    PartialFailureError,
    RefusedHandlesError,
    RejectedError,
    StorageError,
    ThrottledError,
    TransientError,
)
from vodpoller.events.event import Lease, event_key, read_event
from vodpoller.journal.contract import Portion
from vodpoller.journal.place import connect
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.liveness import Liveness
from vodpoller.pipeline import Pipeline
from vodpoller.router import Router
from vodpoller.sinks.contract import Sink
from vodpoller.sinks.file.appending import Files
from vodpoller.sinks.file.sink import FileConfig, FileSink
from vodpoller.telemetry import Telemetry
from vodpoller.vod.answers import Pull
from vodpoller.vod.confirmer import Confirmer

LEASE_SECS = 30.0
SINKS_OF = {"Both": ("file", "plain"), "File": ("file",), "Plain": ("plain",), "Unrouted": ("",)}
# An event without a task id; all events with this content are equal.
CAST = {"EventType": "Cast", "CastEvent": {"CastId": "c", "Status": "Working"}}
CAST_KEY = event_key(CAST, None)


def folder_in_memory():
    """A temporary folder in /dev/shm, where syncs are fast; elsewhere if that is not writable."""
    fast = "/dev/shm"
    return tempfile.TemporaryDirectory(
        prefix="vodpoller-", dir=fast if os.access(fast, os.W_OK) else None, ignore_cleanup_errors=True
    )


class CrashedError(BaseException):
    """The process ended at this step; not an Exception, since nothing may handle it."""


class Actor:
    def __init__(self, name, task, stage):
        self.name = name
        self.ready = lambda: True
        self.done = False
        self.killed = False
        self.error = None
        self.go = threading.Semaphore(0)
        self.back = threading.Semaphore(0)
        self._task = task
        self._stage = stage
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self):
        self._stage.here.actor = self
        self.go.acquire()
        try:
            if not self.killed:
                self._task()
        except CrashedError:
            pass
        except BaseException as error:  # noqa: BLE001 - `Stage.step` raises it in the test
            self.error = error
        self.done = True
        self.back.release()


class Stage:
    """Moves actors, one at a time."""

    def __init__(self):
        self.here = threading.local()
        self.actors = []
        self.steps = 0
        self.last_first = False

    def start(self, name, task):
        actor = Actor(name, task, self)
        self.actors.append(actor)
        return actor

    def named(self, name):
        return [actor for actor in self.actors if actor.name == name]

    def ready(self):
        return [actor for actor in self.actors if actor.ready()]

    def step(self, actor):
        """Move the actor to its next pause, or to its end."""
        self.steps += 1
        actor.go.release()
        assert actor.back.acquire(timeout=20), f"{actor.name} blocks where it should not"
        if actor.done:
            self.actors.remove(actor)
            actor.thread.join()
            if actor.error is not None:
                raise actor.error

    def run(self, *, most=100_000):
        """Move actors until all wait or `most` steps are done: always the first ready one, or the last (`last_first`).

        Returns:
            The number of steps.
        """
        done = 0
        while done < most and (ready := self.ready()):
            self.step(ready[-1 if self.last_first else 0])
            done += 1
        return done

    def pause(self, ready=lambda: True):
        """Called in an actor: wait until the stage moves this actor again, which it may do once `ready` is true."""
        actor = getattr(self.here, "actor", None)
        if actor is None:
            return
        actor.ready = ready
        actor.back.release()
        actor.go.acquire()
        actor.ready = lambda: True
        if actor.killed:
            raise CrashedError

    def kill(self):
        """End all actors at their present pause."""
        for actor in self.actors:
            actor.killed = True
            actor.go.release()
            actor.thread.join(20)
            assert not actor.thread.is_alive()
        self.actors.clear()


@dataclass
class QueuedEvent:
    number: int
    content: dict
    key: bytes
    sinks: tuple
    handle: str | None = None
    lease_ends_at: float = 0.0
    confirmed: bool = False
    pulls: int = 0


class ModelQueue:
    """VOD's queue: leases on a clock, a new handle at each delivery; one stale handle refuses all or only itself."""

    def __init__(self, clock, *, atomic, lease_secs=LEASE_SECS):
        self._clock = clock
        self._lease_secs = lease_secs
        self.atomic = atomic
        self.events = []
        self._handles = 0

    def feed_cast(self):
        self.events.append(QueuedEvent(len(self.events), CAST, CAST_KEY, ("file", "plain")))

    def feed(self, event_type):
        number = len(self.events)
        content = {"EventType": event_type, "SomeEvent": {"FileId": f"{number:06d}", "TaskId": "t" * (1 + number % 7)}}
        self.events.append(QueuedEvent(number, content, event_key(content, None), SINKS_OF[event_type]))

    def _leased(self, event):
        return event.handle is not None and self._clock() < event.lease_ends_at

    def visible(self):
        return [event for event in self.events if not event.confirmed and not self._leased(event)]

    def pull(self):
        taken = self.visible()[:16]
        for event in taken:
            self._handles += 1
            event.handle = f"handle-{self._handles}"
            event.lease_ends_at = self._clock() + self._lease_secs
            event.pulls += 1
        return taken

    def of_handle(self, handle):
        return next(
            (event for event in self.events if event.handle == handle and self._leased(event) and not event.confirmed),
            None,
        )


class FakeVod:
    """The part of the client that pullers use. Each call does what its script says next, or succeeds."""

    def __init__(self, world):
        self._world = world
        self.pull_script = deque()
        self.confirm_script = deque()

    def pull(self, source, sub_app_id):
        world = self._world
        asked_at = world.clock()
        world.stage.pause()
        fault = self.pull_script.popleft() if self.pull_script else "ok"
        if fault == "lost_before":
            raise TransientError("the request did not arrive")
        taken = [
            read_event({"EventHandle": event.handle, **event.content}, source=source, sub_app_id=sub_app_id)
            for event in world.queue.pull()
        ]
        world.stage.pause()
        if fault == "lost_after":
            raise TransientError("the answer was lost")
        lease = Lease(starts_at=asked_at, secs=LEASE_SECS)
        return Pull(events=tuple(taken), malformed=(), lease=lease, hung_secs=0.0, request_id="r")

    def await_confirm_slot(self, timeout_secs):
        self._world.stage.pause()
        return True

    def confirm(self, sub_app_id, handles, timeout_secs=None):
        world = self._world
        world.stage.pause()
        fault = self.confirm_script.popleft() if self.confirm_script else "ok"
        if fault == "lost_before":
            raise TransientError("the request did not arrive")
        if fault == "throttled":
            raise ThrottledError("slower")
        found = [world.queue.of_handle(handle) for handle in handles]
        refused = None in found
        for event in found:
            if event is not None and not (refused and world.queue.atomic):
                world.check_confirm(event)
                event.confirmed = True
        world.stage.pause()
        if fault == "lost_after":
            raise TransientError("the answer was lost")
        if refused:
            raise RefusedHandlesError("some handle is stale", error_code="InvalidParameterValue")


class StagedFiles(Files):
    """Pauses before and after each step, records what is synced, and fails according to its scripts."""

    def __init__(self, stage):
        self._stage = stage
        self.synced = {}
        self.write_script = deque()
        self.sync_script = deque()

    def open(self, path, flags):
        self._stage.pause()
        fd = super().open(path, flags)
        self._stage.pause()
        return fd

    def sync_folder(self, path):
        pass

    def write(self, fd, data):
        self._stage.pause()
        fault = self.write_script.popleft() if self.write_script else "ok"
        if fault == "full":
            super().write(fd, data[: len(data) // 2])
            self._stage.pause()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        half = max(len(data) // 2, 1)
        written = super().write(fd, data[:half])
        self._stage.pause()
        if fault != "short":
            written += super().write(fd, data[half:])
            self._stage.pause()
        return written

    def fdatasync(self, fd):
        self._stage.pause()
        if self.sync_script and self.sync_script.popleft() == "fails":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        status = os.fstat(fd)
        self.synced[status.st_ino] = status.st_size
        self._stage.pause()

    def ftruncate(self, fd, length_bytes):
        self._stage.pause()
        super().ftruncate(fd, length_bytes)
        inode = os.fstat(fd).st_ino
        self.synced[inode] = min(self.synced.get(inode, 0), length_bytes)


class PlainSink(Sink):
    """A sink without idempotency: it keeps what it accepts, also when the process dies."""

    concurrency = 2
    batch_events = 4

    def __init__(self, world):
        self._world = world

    def deliver(self, events, timeout_secs):
        world = self._world
        with world.delivering("plain", [event.key for event in events]):
            world.stage.pause()
            fault = world.plain_script.popleft() if world.plain_script else "ok"
            if fault == "transient":
                raise TransientError("not now")
            if fault == "rejected":
                raise RejectedError("never")
            first = 1 if fault == "partial" else 0
            world.plain_accepted.extend(event.key for event in events[first:])
            world.plain_casts |= {event.key for event in events[first:] if event.type == "Cast"}
            if fault == "answer_lost":
                world.excused |= {event.key for event in events}
                raise TransientError("it took them, and its answer was lost")
            world.stage.pause()
            if fault == "partial":
                raise PartialFailureError({0: TransientError("not this one")})


class WatchedFileSink(FileSink):
    def __init__(self, world, config):
        self._world = world
        context = sink_context(log_into(world.lines, "error"), monotonic=world.clock, wall=world.wall)
        super().__init__("file", config, context, files=world.files)

    def deliver(self, events, timeout_secs):
        with self._world.delivering("file", [event.key for event in events]):
            super().deliver(events, timeout_secs)


class StagedWait(DeliveryWait):
    def __init__(self, world):
        super().__init__()
        self._world = world

    def wait(self, timeout_secs):
        ends_at = self._world.clock() + timeout_secs
        self._world.stage.pause(lambda: self._is_over() or self._world.clock() >= ends_at)
        if self._missing <= 0:
            return WaitEnd.COMPLETE
        return self._interrupted or WaitEnd.OUT_OF_TIME


class StagedWorker(Worker):
    def __init__(self, *, stage, **rest):
        super().__init__(**rest)
        self._stage = stage

    def _spawn_if_useful(self):
        while len(self._threads) < self.sink.concurrency:
            self._threads.append(self._stage.start(f"sink-{self.name}", self._run).thread)

    def _step(self, taken):
        self._stage.pause(self._has_work)
        super()._step(taken)

    def _has_work(self):
        is_due = bool(self._delayed) and self._delayed[0][0] <= self._monotonic()
        return self._stopping or is_due or bool(self._queue)


class StagedConfirmer(Confirmer):
    def __init__(self, *, world, **rest):
        super().__init__(**rest)
        self._world = world

    def _wait(self, puller, timeout_secs):
        world, was_caller = self._world, puller.is_caller
        ends_at = inf if timeout_secs is None else world.clock() + timeout_secs
        puller.woken.release()
        world.stage.pause(lambda: not puller.missing or puller.is_caller != was_caller or world.clock() >= ends_at)
        puller.woken.acquire()


class BreakableConnection:
    """A connection of the journal; its disk is full while `journal_is_broken` is true."""

    def __init__(self, connection, world):
        self._connection = connection
        self._world = world

    def execute(self, sql, *parameters):
        if self._world.journal_is_broken and sql.startswith("BEGIN"):
            raise sqlite3.OperationalError("database or disk is full")
        answer = self._connection.execute(sql, *parameters)
        if sql == "COMMIT":
            self._world.journal_committed(self._connection)
        return answer

    def __getattr__(self, name):
        return getattr(self._connection, name)


class World:
    """A process that can die at any step, and everything that outlives it."""

    def __init__(self, folder, *, atomic=True):
        self.folder = Path(folder)
        self.archive = self.folder / "events.jsonl"
        self.journal_path = self.folder / "journal.db"
        self.stage = Stage()
        self.clock = FakeClock()
        self.wall = FakeClock(1_700_000_000.0)
        self.queue = ModelQueue(self.clock, atomic=atomic)
        self.vod = FakeVod(self)
        self.files = StagedFiles(self.stage)
        self.plain_script = deque()
        self.plain_accepted = []
        self.plain_casts = set()
        self.excused = set()  # keys that the plain sink may get again: no ledger row was written
        self.journal_is_broken = False
        self.journal_committed = lambda connection: None
        self.violations = []
        self.lines = []
        self.crashes = 0
        self.rotations = 0
        self.running = Counter()
        self.journal = self.sink = self.pipeline = self.retrier = None
        self.is_up = False

    # --- the process ---

    def boot(self):
        """Build the daemon's parts. It runs in an actor, so that the process can die during it."""
        try:
            self._boot()
        except (ConfigError, StorageError, TransientError):  # the daemon would exit with a message
            self._close_all()

    def _boot(self):
        log = log_into(self.lines, "error")
        self.journal = SqliteJournal(
            self.journal_path,
            max_bytes=1 << 30,
            ledger_days=7,
            telemetry=Telemetry(log),
            wall=self.wall,
            monotonic=self.clock,
            connect=lambda path: BreakableConnection(connect(path), self),
        )
        write = self.journal.commits.write

        def staged_write(work, *, durable):
            self.stage.pause()
            write(work, durable=durable)
            self.stage.pause()

        self.journal.commits.write = staged_write
        self.sink = WatchedFileSink(self, FileConfig(type="file", path=str(self.archive)))
        for portion in self.sink.recover(self.journal.position("file"), {None}):
            self.journal.recover("file", portion)
        self.journal.recover("file", Portion(keys=(), position=self.sink.position(), read=1.0))
        in_flight = InFlight()
        workers = {
            name: StagedWorker(
                stage=self.stage,
                name=name,
                sink=sink,
                ledger=self.journal,
                in_flight=in_flight,
                queue_max_events=16,
                breaker_failures=3,
                telemetry=Telemetry(log),
                liveness=Liveness(monotonic=self.clock),
                monotonic=self.clock,
                wall=self.wall,
            )
            for name, sink in (("file", self.sink), ("plain", PlainSink(self)))
        }
        routes = [
            SimpleNamespace(name=kind, event_types=[kind], sources=None, where=None, sinks=sinks)
            for kind, sinks in SINKS_OF.items()
            if kind != "Unrouted"
        ] + [SimpleNamespace(name="cast", event_types=["Cast"], sources=None, where=None, sinks=("file", "plain"))]
        self.pipeline = Pipeline(
            router=Router(routes),
            workers=workers,
            in_flight=in_flight,
            journal=self.journal,
            confirmer=self._confirmer(log),
            confirm_reserve_secs=5.0,
            requests_per_sec=100.0,
            telemetry=Telemetry(log),
            monotonic=self.clock,
            wall=self.wall,
        )
        self.retrier = Retrier(
            journal=self.journal,
            workers=workers,
            in_flight=in_flight,
            give_up_after_secs={"file": 604_800.0, "plain": 604_800.0},
            telemetry=Telemetry(log),
            monotonic=self.clock,
            gather_secs=0,
        )
        self.stage.start("results", self._write_results)
        for worker in workers.values():
            worker.start()
        self.is_up = True

    def _confirmer(self, log):
        return StagedConfirmer(
            world=self,
            vod=self.vod,
            telemetry=Telemetry(log),
            liveness=Liveness(monotonic=self.clock),
            reserve_secs=5.0,
            monotonic=self.clock,
            sleep=self._sleep,
        )

    def start(self):
        self.stage.start("boot", self.boot)

    def pull(self):
        """Pull and process one batch, as a puller does."""
        source = SimpleNamespace(name="main", sub_app_id=None, on_failure="store", unrouted="dead_letter")

        def puller():
            began_at = self.clock()
            try:
                pull = self.vod.pull(source.name, source.sub_app_id)
            except TransientError:
                self.journal.answer_lost(source.name, sent_ago_secs=self.clock() - began_at)
                return
            batch = Batch.of(source, pull, self.clock())
            if batch.events:
                self.pipeline.process(batch, StagedWait(self))
            else:
                self.journal.answered_empty(batch.pulled(self.clock()))

        self.stage.start("puller", puller)

    def keep_up(self):
        """Run the periodic tasks of each second."""

        def upkeep():
            self.journal.flush()
            self.retrier.submit_due()

        self.stage.start("upkeep", upkeep)

    def _write_results(self):
        """Write the results of retries, until the end of the process."""
        retrier = self.retrier
        while True:
            self.stage.pause(lambda: retrier.results)
            retrier.write_results(0)

    def prune(self):
        self.stage.start("prune", self.journal.prune)

    def rename(self):
        if self.archive.exists():
            self.rotations += 1
            self.archive.rename(f"{self.archive}.{self.rotations}")

    def rotate(self, *, reloads=True):
        """As logrotate does: rename the file, then reopen it."""
        self.rename()
        if reloads:
            self.sink.reopen()

    def advance(self, secs):
        self.clock.advance(secs)
        self.wall.advance(secs)

    def _sleep(self, secs):
        self.advance(secs)
        self.stage.pause()

    def crash(self):
        """As `kill -9`: no actor moves again; only files remain."""
        self.crashes += 1
        self.stage.kill()
        self.running.clear()
        self._close_all()
        self.excused |= set(self.plain_accepted) - self._ledger("plain")

    def end(self):
        self.stage.kill()
        self._close_all()

    def _close_all(self):
        if self.sink is not None:
            self.sink.close()
        if self.journal is not None:
            self.journal.abandon()
        self.journal = self.sink = self.pipeline = self.retrier = None
        self.is_up = False

    def run_dry(self):
        """Run without faults until VOD holds no event and the journal no pending one."""
        self.plain_script.clear()
        self.vod.pull_script.clear()
        self.vod.confirm_script.clear()
        self.files.write_script.clear()
        self.files.sync_script.clear()
        self.journal_is_broken = False
        self.stage.run()
        if not self.is_up:
            self.start()
        for _ in range(300):
            self.stage.run()
            self.check()
            if self._is_settled():
                return
            if self.queue.visible() and self.journal.is_writable:
                self.pull()
            self.keep_up()
            self.stage.run()
            self.advance(11)
        raise AssertionError(f"not everything is settled: {self.queue.events}, {self.rows('letters')}")

    def _is_settled(self):
        pending = self.rows("letters WHERE state = 'pending'")
        return not pending and all(event.confirmed for event in self.queue.events)

    # --- what can be seen from outside ---

    def rows(self, what, columns="key, sink"):
        if not self.journal_path.exists():
            return []
        db = sqlite3.connect(self.journal_path, timeout=1)
        try:
            return db.execute(f"SELECT {columns} FROM {what}").fetchall()
        except sqlite3.OperationalError:
            return []  # it died before the tables were created
        finally:
            db.close()

    def _ledger(self, sink):
        return {key for key, name in self.rows("ledger") if name == sink}

    def archived(self, *, only_synced=False):
        """The keys of the complete lines, also of rotated files."""
        keys = []
        for path in sorted(self.folder.glob("events.jsonl*")):
            if path.suffix == ".lock":
                continue
            data = path.read_bytes()
            if only_synced:
                data = data[: self.files.synced.get(path.stat().st_ino, 0)]
            keys += [key for line in data.split(b"\n")[:-1] if (key := _key_of(line)) is not None]
        return keys

    def delivering(self, sink, keys):
        """A context around each call of a sink: no other call may have these events, and the ledger must lack them."""
        return _Delivering(self, sink, keys)

    def check_confirm(self, event):
        """Check the promises at the moment of a confirm."""
        if event.content is CAST:
            self._check_confirm_of_a_cast()
            return
        letters, ledger = set(self.rows("letters")), set(self.rows("ledger"))
        archived = self.archived(only_synced=True)
        has = {"file": event.key in archived, "plain": event.key in self.plain_accepted, "": False}
        for sink in event.sinks:
            stored = (event.key, sink) in letters
            if not (has[sink] or stored):
                self.violations.append(f"event {event.number} was confirmed, and neither {sink} nor the journal has it")
            if not (stored or (event.key, sink) in ledger or self.journal.unwritten):
                self.violations.append(f"event {event.number} was confirmed before {sink}'s row was in the ledger")

    def _check_confirm_of_a_cast(self):
        confirmed = 1 + sum(event.content is CAST and event.confirmed for event in self.queue.events)
        stored = Counter(sink for _, sink in self.rows("letters WHERE event_type = 'Cast'"))
        held = {"file": self.archived(only_synced=True).count(CAST_KEY), "plain": len(self.plain_casts)}
        for sink, number in held.items():
            if number + stored[sink] < confirmed:
                self.violations.append(f"{confirmed} equal events are confirmed, and {sink} or the journal have fewer")

    def check(self):
        """Check the promises; no actor may be moving."""
        assert not self.violations, self.violations
        often = [key.hex() for key, times in Counter(self.archived()).items() if times > 1 and key != CAST_KEY]
        assert not often, f"lines that are there twice: {often}"
        taken = Counter(self.plain_accepted)
        again = {key for key, times in taken.items() if times > 1} - self.excused
        assert not again, f"the plain sink got these twice without a reason: {again}"
        unforeseen = [line for line in self.lines if line["event"] in ("puller.failed", "worker.failed")]
        assert not unforeseen, unforeseen

    def check_end(self):
        """Check after everything is settled: each event is at each of its sinks, or a dead letter."""
        self.check()
        dead = set(self.rows("letters WHERE state = 'dead'"))
        archived = set(self.archived())
        for event in self.queue.events:
            if event.content is CAST:
                continue
            has = {"file": event.key in archived, "plain": event.key in self.plain_accepted, "": False}
            for sink in event.sinks:
                assert has[sink] or (event.key, sink) in dead, f"{sink} never got event {event.number}"
        casts = sum(event.content is CAST for event in self.queue.events)
        assert (self.archived().count(CAST_KEY), len(self.plain_casts)) == (casts, casts), "wrong number of casts"
        for path in self.folder.glob("events.jsonl*"):
            data = path.read_bytes()
            torn = [line for line in data.split(b"\n") if line and _key_of(line) is None]
            assert not torn, f"{path.name} holds torn lines: {torn}"
            assert not data or data.endswith(b"\n"), f"{path.name} ends with a torn line"


def _key_of(line):
    """The key of the event in a line; None if the line is torn."""
    try:
        return event_key(json.loads(line.decode()), None)
    except ValueError:
        return None


class _Delivering:
    def __init__(self, world, sink, keys):
        self._world = world
        self._pairs = [(key, sink) for key in keys]

    def __enter__(self):
        world = self._world
        running = [pair for pair in self._pairs if world.running[pair]]
        if running:
            world.violations.append(f"delivered twice at once: {running}")
        since = world.wall() - 600
        known = set(world.rows(f"ledger WHERE confirmed_at IS NULL OR confirmed_at > {since}"))
        if known & set(self._pairs):
            world.violations.append(f"delivered although the ledger has it: {known & set(self._pairs)}")
        world.running.update(self._pairs)

    def __exit__(self, *_exception):
        self._world.running.subtract(self._pairs)
