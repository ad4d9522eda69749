"""Events of equal content without a task id, with a model of VOD's queue and the real journal.

The faults of VOD and the network happen at random times: several pulls are outstanding, hang or lose their answers;
confirm requests or their answers are lost, or confirms are refused; and the process is killed. Each event must be
delivered under exactly one key of its own.

The profile of hypothesis sets the number of sequences that are tried.
"""

import heapq
import random
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock, log_into
from tests.model.sampling import IS_THOROUGH
from tests.model.world import folder_in_memory
from vodpoller.events.event import event_key
from vodpoller.journal.contract import Known, Pulled
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.telemetry import Telemetry

LEASE_SECS = 30.0
RESERVE_SECS = 5.0
PULL_TIMEOUT_SECS = 10.0
SINK = "it"
MODEL = settings(
    derandomize=not IS_THOROUGH,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@dataclass(eq=False)
class QueuedEvent:
    content_key: bytes
    leased_until: float = -inf
    is_confirmed: bool = False
    was_handed_out: bool = False
    is_acknowledged: bool = False


@dataclass(frozen=True)
class Circumstances:
    """Load and rates of the faults.

    Args:
        contents: Number of different contents.
        pullers: Maximum number of outstanding pulls.
        gap_secs: Mean time between two births.
        lost_pulls: Share of pulls that are lost: the request in a quarter of them, else the answer.
        lost_confirms: Share of confirms whose request is lost; the answers of an equal share are lost.
        refused: Share of confirm requests that VOD refuses completely.
        crashes: Share of batches during which the process is killed.
    """

    contents: int
    pullers: int
    gap_secs: float
    lost_pulls: float = 0.0
    lost_confirms: float = 0.0
    refused: float = 0.0
    crashes: float = 0.0


@dataclass
class Found:
    """Counts of a run.

    Args:
        events: Number of events.
        lost: Number of confirmed events that were not delivered.
        doubled: Number of deliveries under a second key.
        excused: Number of events that may be doubled: VOD refused their confirm after an earlier answer was lost.
        unacknowledged: Number of events that VOD confirmed without the process knowing it: the process died, or no
            answer came until the lease ended. For each of them one equal event may be lost.
        crashes: Number of kills.
    """

    events: int = 0
    lost: int = 0
    doubled: int = 0
    excused: int = 0
    unacknowledged: int = 0
    crashes: int = 0


class Process:
    """The memory of one life of the daemon. Actions that are scheduled for it do not run after its end."""

    def __init__(self, journal):
        self.journal = journal
        self.is_alive = True


@dataclass
class Model:
    """VOD's queue, the network, the pullers and a sink, on one clock.

    Args:
        folder: Folder of the journals, one file for each life.
        random: Decides everything that happens.
        circumstances: Load and rates of the faults.
    """

    folder: Path
    random: random.Random
    circumstances: Circumstances
    clock: FakeClock = field(default_factory=FakeClock)
    found: Found = field(default_factory=Found)
    queue: list = field(default_factory=list)
    delivered: Counter = field(default_factory=Counter)
    keys: set = field(default_factory=set)
    excused: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._lines = []
        self._agenda = []
        self._order = count()
        self._lives = count()
        self._hanging = []
        self._closing = ExitStack()
        self._path = None
        self._start()

    # --- time ---

    def at(self, secs, what, process=None):
        """Schedule a call, which is skipped if the process has died by then."""
        heapq.heappush(self._agenda, (self.clock() + secs, next(self._order), process, what))

    def run(self, births):
        """Run until this number of events was born and all of them are confirmed."""
        self._birth(births)
        ends_at = inf
        while self._agenda and self.clock() < ends_at:
            self.clock.now, _, process, what = heapq.heappop(self._agenda)
            if process is None or process.is_alive:
                what()
            if ends_at == inf and self.found.events == births and all(event.is_confirmed for event in self.queue):
                ends_at = self.clock() + 2 * LEASE_SECS  # time for a late delivery
        assert ends_at < inf, "not all events are confirmed"
        self._count()
        self._closing.close()

    def _count(self):
        handed_out = Counter(event.content_key for event in self.queue if event.was_handed_out)
        for content_key, number in handed_out.items():
            more = self.delivered[content_key] - number
            self.found.lost += max(-more, 0)
            self.found.doubled += max(more - self.excused[content_key], 0)
        self.found.excused = self.excused.total()
        self.found.unacknowledged = sum(not event.is_acknowledged for event in self.queue)

    # --- the process ---

    def _start(self):
        path = self.folder / f"journal-{next(self._lives)}.db"
        if self._path is not None:  # the new life gets only what is in the files
            shutil.copy(self._path, path)
            shutil.copy(self._path.with_name(f"{self._path.name}-wal"), path.with_name(f"{path.name}-wal"))
        self._path = path
        journal = SqliteJournal(
            path,
            max_bytes=10**7,
            ledger_days=14,
            telemetry=Telemetry(log_into(self._lines)),
            wall=lambda: self.clock() + 1_700_000_000.0,
            monotonic=self.clock,
        )
        self._closing.callback(journal.close)
        self._process = Process(journal)
        for _ in range(self.circumstances.pullers):
            self.at(self.random.uniform(0.0, 1.0), self._pull, self._process)
        self.at(1.0, self._keep_up, self._process)

    def _keep_up(self):
        self._process.journal.flush()
        self.at(1.0, self._keep_up, self._process)

    def _crash(self):
        self.found.crashes += 1
        self._process.is_alive = False
        self.at(self.random.uniform(0.2, 5.0), self._start)

    # --- a pull ---

    def _pull(self):
        """Send a pull; VOD answers when it has an event, or after up to 5 s."""
        sent_at, process = self.clock(), self._process
        fate = self.random.random()
        if fate < self.circumstances.lost_pulls / 4:  # the request did not arrive
            self.at(self.random.uniform(0.01, PULL_TIMEOUT_SECS), lambda: self._lost(sent_at), process)
            return
        is_lost = fate < self.circumstances.lost_pulls
        request = [sent_at, process, is_lost, self.random.uniform(1.0, 5.0)]
        self.at(self.random.uniform(0.005, 0.3), lambda: self._arrives(request))

    def _arrives(self, request):
        self._hanging.append(request)
        self._hand_out()
        if request in self._hanging:
            self.at(request[3], lambda: self._ends_empty(request))

    def _ends_empty(self, request):
        if request in self._hanging:
            self._hanging.remove(request)
            self._answer(request, [])

    def _hand_out(self):
        """VOD hands visible events to the hanging requests, in the order of their arrival."""
        while self._hanging:
            visible = [it for it in self.queue if not it.is_confirmed and it.leased_until <= self.clock()]
            if not visible:
                return
            taken = visible[: self.random.randint(1, 16)]
            for event in taken:
                event.leased_until = self.clock() + LEASE_SECS
                event.was_handed_out = True
                self.at(LEASE_SECS, self._hand_out)
            self._answer(self._hanging.pop(0), taken)

    def _answer(self, request, events):
        sent_at, process, is_lost, _ = request
        way_secs = self.random.uniform(0.005, 0.3)
        if is_lost:
            secs = self.random.choice([way_secs, max(sent_at + PULL_TIMEOUT_SECS - self.clock(), way_secs)])
            self.at(secs, lambda: self._lost(sent_at), process)
        else:
            self.at(way_secs, lambda: self._answered(sent_at, events), process)

    def _lost(self, sent_at):
        self._process.journal.answer_lost("main", sent_ago_secs=self.clock() - sent_at)
        self.at(self.random.uniform(0.0, 2.0), self._pull, self._process)

    def _answered(self, sent_at, events):
        if events:
            answered_at = self.clock()
            batch = Batch(self, sent_at, answered_at, events, self._process)
            if self.random.random() < self.circumstances.crashes:  # at any time from the sending of the pull
                secs = self.random.uniform(sent_at - answered_at, batch.lasts_secs)
                self.at(max(secs, 0.0), self._crash, self._process)
            self.at(self.random.uniform(0.0, 0.02), batch.identify, self._process)
        else:
            self._process.journal.answered_empty(self.pulled(sent_at, self.clock()))
            self.at(self.random.uniform(0.0, 0.01), self._pull, self._process)

    def pulled(self, sent_at, answered_at):
        now = self.clock()
        return Pulled(
            source="main", sent_ago_secs=now - sent_at, answered_ago_secs=now - answered_at, lease_secs=LEASE_SECS
        )

    def next_pull(self):
        self.at(self.random.uniform(0.0, 0.01), self._pull, self._process)

    # --- births ---

    def _birth(self, left):
        content = {"EventType": "FileDeleted", "Number": self.random.randrange(self.circumstances.contents)}
        self.queue.append(QueuedEvent(event_key(content, None)))
        self.found.events += 1
        self._hand_out()
        if left > 1:
            gap_secs = self.random.expovariate(1 / self.circumstances.gap_secs)
            if self.random.random() < 0.05:
                gap_secs += self.random.uniform(0.0, 3 * LEASE_SECS)
            self.at(gap_secs, lambda: self._birth(left - 1))


class Batch:
    """The events of one pull, until they are confirmed."""

    def __init__(self, model, sent_at, answered_at, events, process):
        self.model = model
        self.sent_at = sent_at
        self.answered_at = answered_at
        self.events = events
        self.process = process
        self.keys = []
        self.has_lost_an_answer = False
        longest_secs = max(sent_at + LEASE_SECS - RESERVE_SECS - model.clock(), 0.1)
        self.takes_secs = model.random.choice([0.01, 1.0, longest_secs]) * model.random.uniform(0.1, 1.0)
        self.lasts_secs = self.takes_secs + 0.05

    def identify(self):
        model = self.model
        pulled = model.pulled(self.sent_at, self.answered_at)
        self.keys = self.process.journal.identify([event.content_key for event in self.events], pulled)
        assert len(set(self.keys)) == len(self.keys)
        model.next_pull()
        model.at(self.takes_secs, self.deliver, self.process)

    def deliver(self):
        model, journal = self.model, self.process.journal
        known = journal.known([(key, SINK) for key in self.keys])
        assert set(known.values()) <= {Known.ACCEPTED}
        for event, key in zip(self.events, self.keys, strict=True):
            if (key, SINK) not in known and key not in model.keys:
                model.keys.add(key)
                model.delivered[event.content_key] += 1
        journal.accept(SINK, self.keys, None)
        self._send_confirm()

    def _send_confirm(self):
        """As the confirmer does: repeat until there is an answer or the lease ends."""
        model = self.model
        if model.clock() < self.sent_at + LEASE_SECS:
            model.at(model.random.uniform(0.002, 0.025), self._confirm_arrives)  # also if the process dies meanwhile

    def _confirm_arrives(self):
        model, harm = self.model, self.model.circumstances
        fate = model.random.random()
        if fate < harm.lost_confirms:  # the request is lost
            self._confirm_was_lost()
            return
        are_live = all(not event.is_confirmed and event.leased_until > model.clock() for event in self.events)
        are_mine = all(event.leased_until <= self.answered_at + LEASE_SECS for event in self.events)
        is_refused = not (are_live and are_mine) or fate < harm.lost_confirms + harm.refused
        if not is_refused:
            for event in self.events:
                event.is_confirmed = True
        if fate > 1 - harm.lost_confirms:  # the answer is lost
            self._confirm_was_lost()
        else:
            model.at(model.random.uniform(0.002, 0.025), lambda: self._confirm_answered(is_refused), self.process)

    def _confirm_was_lost(self):
        self.has_lost_an_answer = True
        self.model.at(self.model.random.uniform(0.05, 1.0), self._send_confirm, self.process)

    def _confirm_answered(self, is_refused):
        if not is_refused or self.has_lost_an_answer:
            if is_refused:
                self.model.excused.update(event.content_key for event in self.events if not event.is_confirmed)
            for event in self.events:
                event.is_acknowledged |= event.is_confirmed
            self.process.journal.confirmed(self.keys)


def run_model(seed, circumstances, births):
    with folder_in_memory() as folder:
        model = Model(Path(folder), random.Random(seed), circumstances)
        model.run(births)
        return model.found


CIRCUMSTANCES = st.builds(
    Circumstances,
    contents=st.integers(1, 3),
    pullers=st.integers(1, 6),
    gap_secs=st.sampled_from([0.05, 0.5, 2.0, 10.0, 40.0]),
    lost_pulls=st.sampled_from([0.0, 0.05, 0.3]),
    lost_confirms=st.sampled_from([0.0, 0.05, 0.3]),
    refused=st.sampled_from([0.0, 0.1, 0.3]),
)


@MODEL
@given(seed=st.integers(0, 2**32), circumstances=CIRCUMSTANCES)
@example(seed=5, circumstances=Circumstances(contents=1, pullers=5, gap_secs=2.0, refused=0.3))
def test_without_kills_no_event_is_doubled_or_lost(seed, circumstances):
    found = run_model(seed, circumstances, births=60)
    assert found.doubled == 0, found
    assert found.lost <= found.unacknowledged, found


@MODEL
@given(seed=st.integers(0, 2**32), circumstances=CIRCUMSTANCES)
def test_kills_lose_only_events_equal_to_unacknowledged_ones(seed, circumstances):
    found = run_model(seed, replace(circumstances, crashes=0.15), births=60)
    assert found.doubled == 0, found
    assert found.lost <= found.unacknowledged, found
