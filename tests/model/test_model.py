"""The promises, checked with a model of VOD's queue: whatever fails, and wherever the process dies."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.model.sampling import IS_THOROUGH, STRIDE
from tests.model.world import SINKS_OF, World, folder_in_memory


class Consumer(RuleBasedStateMachine):
    """Events, faults, time and crashes in any order. The profile of hypothesis sets the number of sequences."""

    def __init__(self):
        super().__init__()
        self.folder = folder_in_memory()
        self.world = None

    @initialize(atomic=st.booleans())
    def begin(self, atomic):
        self.world = World(self.folder.name, atomic=atomic)
        self.world.start()
        self.world.stage.run()

    def teardown(self):
        try:
            if self.world is not None:
                self.world.run_dry()
                self.world.check_end()
        finally:
            if self.world is not None:
                self.world.end()
            self.folder.cleanup()

    @invariant()
    def nothing_was_lost_or_doubled(self):
        if self.world is not None:
            self.world.check()

    def is_up(self):
        return self.world is not None and self.world.is_up

    # --- what happens at VOD ---

    @rule(kinds=st.lists(st.sampled_from(list(SINKS_OF)), min_size=1, max_size=4))
    def feed(self, kinds):
        for kind in kinds:
            self.world.queue.feed(kind)

    @rule(fault=st.sampled_from(["lost_before", "lost_after"]))
    def next_pull_fails(self, fault):
        self.world.vod.pull_script.append(fault)

    @rule(faults=st.lists(st.sampled_from(["ok", "lost_before", "lost_after", "throttled"]), min_size=1, max_size=4))
    def next_confirms(self, faults):
        self.world.vod.confirm_script.extend(faults)

    # --- what happens at the sinks and on the disk ---

    @rule(
        faults=st.lists(
            st.sampled_from(["transient", "rejected", "partial", "answer_lost", "ok"]), min_size=1, max_size=4
        )
    )
    def next_deliveries(self, faults):
        self.world.plain_script.extend(faults)

    @rule(faults=st.lists(st.sampled_from(["full", "short", "ok"]), min_size=1, max_size=2))
    def next_writes(self, faults):
        self.world.files.write_script.extend(faults)

    @rule(faults=st.lists(st.sampled_from(["fails", "ok"]), min_size=1, max_size=2))
    def next_syncs(self, faults):
        self.world.files.sync_script.extend(faults)

    @rule(broken=st.booleans())
    def journal_breaks_or_is_mended(self, broken):
        self.world.journal_is_broken = broken and self.world.is_up

    @precondition(is_up)
    @rule(reloads=st.booleans())
    def rotate(self, reloads):
        self.world.rotate(reloads=reloads)

    # --- what the daemon does ---

    @precondition(is_up)
    @rule()
    def pull(self):
        if len(self.world.stage.named("puller")) < 3 and self.world.journal.is_writable:
            self.world.pull()

    @precondition(is_up)
    @rule()
    def keep_up(self):
        if not self.world.stage.named("upkeep"):
            self.world.keep_up()

    @precondition(is_up)
    @rule()
    def prune(self):
        if not self.world.stage.named("prune"):
            self.world.prune()

    @rule(choices=st.lists(st.integers(0, 5), min_size=1, max_size=20))
    def move(self, choices):
        for choice in choices:
            ready = self.world.stage.ready()
            if not ready:
                return
            self.world.stage.step(ready[choice % len(ready)])

    @rule()
    def move_until_all_wait(self):
        self.world.stage.run()

    @rule(secs=st.sampled_from([0.6, 3.0, 6.0, 26.0, 31.0, 700.0]))
    def time_passes(self, secs):
        self.world.advance(secs)

    # --- how it ends ---

    @rule(steps_of_the_next_start=st.integers(0, 20), renamed=st.booleans())
    def crash_and_restart(self, steps_of_the_next_start, renamed):
        self.world.crash()
        if renamed:
            self.world.rename()
        self.world.journal_is_broken = False
        self.world.start()
        self.world.stage.run(most=steps_of_the_next_start)

    @precondition(is_up)
    @rule()
    def stop_and_start(self):
        world = self.world
        world.stage.run()
        if not world.stage.named("puller") and not world.journal_is_broken:
            world.journal.flush()
            world.crash()
            world.start()


Consumer.TestCase.settings = settings(
    stateful_step_count=40,
    derandomize=not IS_THOROUGH,
    suppress_health_check=list(HealthCheck),
    database=None,
)
TestAnyOrderOfFaults = Consumer.TestCase


# --- a crash at each step of critical sequences -----------------------------------------------------------------------


def deliver(world):
    world.pull()
    world.stage.run()


def all_is_well(world):
    deliver(world)


def the_plain_sink_fails_and_recovers(world):
    world.plain_script.extend(["transient"] * 6)
    deliver(world)
    world.advance(26)
    world.stage.run()
    world.advance(11)
    world.keep_up()
    world.stage.run()


def the_answer_to_the_confirm_is_lost(world):
    world.vod.confirm_script.extend(["lost_after", "lost_before"])
    deliver(world)
    world.advance(31)
    deliver(world)


def the_disk_is_full_for_a_moment(world):
    world.files.write_script.extend(["full"])
    world.files.sync_script.extend(["fails"])
    deliver(world)
    world.advance(5)
    world.stage.run()


def the_journal_is_full_for_a_moment(world):
    world.journal_is_broken = True
    deliver(world)
    world.advance(26)
    world.stage.run()
    world.journal_is_broken = False
    world.keep_up()
    world.stage.run()


def a_sink_is_slower_than_the_lease(world):
    world.pull()
    while not any(world.running.values()):
        world.stage.step(world.stage.ready()[0])
    slow = [actor for actor in world.stage.actors if actor.name.startswith("sink")]
    for _ in range(2):
        world.advance(31)
        for _ in range(60):
            others = [actor for actor in world.stage.ready() if actor not in slow]
            if others:
                world.stage.step(others[0])
        world.pull()
    world.stage.run()


def the_file_is_rotated_between_two_batches(world):
    deliver(world)
    world.rotate()
    world.queue.feed("File")
    deliver(world)


def the_file_is_renamed_and_written_to_before_the_reload(world):
    deliver(world)
    world.rotate(reloads=False)
    world.queue.feed("File")
    deliver(world)
    world.sink.reopen()
    world.queue.feed("File")
    deliver(world)


def equal_events_come_one_after_the_other(world):
    for _ in range(2):
        deliver(world)
        world.queue.feed_cast()
    deliver(world)


def equal_events_come_again_since_their_confirm_failed(world):
    world.vod.confirm_script.extend(["lost_before"] * 100)
    world.queue.feed_cast()
    deliver(world)
    world.vod.confirm_script.clear()
    world.advance(31)
    deliver(world)


@pytest.mark.parametrize(("atomic", "renamed", "last_first"), [(True, False, True), (False, True, False)])
@pytest.mark.parametrize(
    "story",
    [
        all_is_well,
        the_plain_sink_fails_and_recovers,
        the_answer_to_the_confirm_is_lost,
        the_disk_is_full_for_a_moment,
        the_journal_is_full_for_a_moment,
        a_sink_is_slower_than_the_lease,
        the_file_is_rotated_between_two_batches,
        the_file_is_renamed_and_written_to_before_the_reload,
        equal_events_come_one_after_the_other,
        equal_events_come_again_since_their_confirm_failed,
    ],
)
def test_a_crash_at_any_step_loses_nothing_and_doubles_nothing(story, atomic, renamed, last_first):
    step, crashed = 1 + len(story.__name__) % STRIDE, True
    while crashed:
        crashed = run_story(story, atomic=atomic, renamed=renamed, last_first=last_first, dies_after=step)
        step += STRIDE
    assert step > 10


class DiesError(Exception):
    pass


def run_story(story, *, atomic, renamed, last_first, dies_after):
    """Run the story up to a step, crash, restart, and run until everything is settled.

    Returns:
        Whether the story reached that step.
    """
    with folder_in_memory() as folder:
        world = World(folder, atomic=atomic)
        step = world.stage.step

        def counted_step(actor):
            if world.stage.steps == dies_after:
                raise DiesError
            step(actor)

        try:
            for kind in ("Both", "Both", "File", "Plain", "Unrouted"):
                world.queue.feed(kind)
            for _ in range(2):
                world.queue.feed_cast()
            world.stage.step = counted_step
            world.stage.last_first = last_first
            crashed = False
            try:
                world.start()
                world.stage.run()
                story(world)
            except DiesError:
                crashed = True
            world.stage.step = step
            world.stage.last_first = False
            world.check()
            world.crash()
            if renamed:
                world.rename()
            world.journal_is_broken = False
            world.start()
            world.run_dry()
            world.check_end()
            # Empty pulls show that VOD has nothing more: a confirm that the crash left open cannot hide an event now.
            for _ in range(2):
                world.advance(31)
                deliver(world)
            world.queue.feed_cast()
            world.run_dry()
            world.check_end()
            return crashed
        finally:
            world.end()


# --- critical orders of two threads -----------------------------------------------------------------------------------


@pytest.fixture
def world():
    with folder_in_memory() as folder:
        world = World(folder)
        world.start()
        world.stage.run()
        try:
            yield world
        finally:
            world.end()


@pytest.mark.parametrize("first", ["puller", "sink-plain"])
@pytest.mark.parametrize("steps", range(12))
def test_a_late_success_and_the_storing_of_an_event_leave_no_row(world, first, steps):
    world.queue.feed("Plain")
    world.pull()
    while not world.running.total():
        world.stage.step(world.stage.ready()[0])
    world.advance(26)
    for _ in range(steps):
        for actor in world.stage.ready()[:]:
            if actor.name == first and not actor.done:
                world.stage.step(actor)
    for name in ("sink-plain", "puller") if first == "puller" else ("puller", "sink-plain"):
        while moving := [actor for actor in world.stage.ready() if actor.name == name]:
            world.stage.step(moving[0])
    world.stage.run()
    assert len(world.plain_accepted) == 1
    world.journal.flush()
    assert world.rows("letters") == [], "it would be delivered again after the ledger row is pruned"
    world.advance(700)
    world.run_dry()
    world.check_end()


def test_a_redelivered_event_joins_its_running_delivery(world):
    world.queue.feed("Plain")
    world.journal_is_broken = True  # so that it is not stored, which would also settle it
    world.pull()
    while not world.running.total():
        world.stage.step(world.stage.ready()[0])
    (slow,) = [actor for actor in world.stage.named("sink-plain") if actor.ready()]
    world.advance(31)
    world.pull()
    while others := [actor for actor in world.stage.ready() if actor is not slow]:
        world.stage.step(others[0])
    assert world.queue.events[0].pulls == 2
    assert world.violations == []
    world.stage.run()
    world.journal_is_broken = False
    world.run_dry()
    world.check_end()
    assert len(world.plain_accepted) == 1


def test_the_mark_of_a_file_stays_before_unwritten_rows(world):
    world.journal_is_broken = True
    world.vod.confirm_script.extend(["lost_before"] * 100)
    world.queue.feed("File")
    world.pull()
    world.stage.run()
    assert world.journal.unwritten == 1
    world.journal_is_broken = False
    world.queue.feed("File")
    world.pull()  # this puller had its permit before the failure was known
    world.stage.run()
    world.crash()
    world.run_dry()
    world.check_end()


def test_a_late_success_in_memory_prevents_the_retry(world):
    world.queue.feed("Plain")
    world.pull()
    while not world.running.total():
        world.stage.step(world.stage.ready()[0])
    world.advance(26)
    while pullers := [actor for actor in world.stage.ready() if actor.name == "puller"]:
        world.stage.step(pullers[0])
    assert len(world.rows("letters")) == 1
    world.journal_is_broken = True
    world.stage.run()
    world.advance(10)
    world.keep_up()
    world.stage.run()
    assert world.journal.unwritten == 1
    world.run_dry()
    world.check_end()
    assert len(world.plain_accepted) == 1


def test_equal_content_after_ten_minutes_is_new_even_across_a_crash(world):
    world.queue.feed("File")
    world.run_dry()
    (event,) = world.queue.events
    world.advance(700)
    event.confirmed, event.handle = False, None
    world.pull()
    while len(world.archived()) < 2:
        world.stage.step(world.stage.ready()[0])
    assert world.rows("ledger", "confirmed_at") != [(None,)], "it should die before the ledger has its row"
    world.crash()
    world.start()
    world.stage.run()
    world.advance(31)
    world.pull()
    world.stage.run()
    assert event.confirmed
    assert world.archived() == [event.key] * 2
